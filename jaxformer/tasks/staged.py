"""A task whose model is another one after surgery."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from jaxformer.errors import ConfigError
from jaxformer.recipe import Batch, Extra, LossOutput, Params, Task


@dataclasses.dataclass(frozen=True)
class StagedTask:
    """Parameters are scored by the first of `stages` that has their shapes; made by the first.

    The updates of a recipe's phases have the stage that trains in each; this is the task of the
    whole, with which the state of any phase is evaluated.
    """

    stages: tuple[Task, ...]

    def init(self, key: jax.Array, batch: Batch) -> tuple[Params, Extra]:
        return self.stages[0].init(key, batch)

    def loss(
        self, params: Params, extra: Extra, batch: Batch, *, key: jax.Array, train: bool
    ) -> LossOutput:
        return self.of(params, batch).loss(params, extra, batch, key=key, train=train)

    def predict(self, params: Params, extra: Extra, batch: Batch, *, key: jax.Array) -> Any:
        return self.of(params, batch).predict(params, extra, batch, key=key)

    def of(self, params: Params, batch: Batch) -> Any:
        """The stage whose parameters have these shapes.

        Raises:
            ConfigError: none has.
        """

        def shapes(tree: Any) -> Any:
            return jax.tree.map(lambda x: x.shape, tree)

        for stage in self.stages:
            found = jax.eval_shape(lambda s=stage: s.init(jax.random.key(0), batch)[0])
            if shapes(found) == shapes(params):
                return stage
        raise ConfigError("StagedTask: no stage has parameters of these shapes")
