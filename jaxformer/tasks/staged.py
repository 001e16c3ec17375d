"""A task whose model is another one after surgery or calibration."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from jaxformer.errors import ConfigError
from jaxformer.recipe import Batch, Extra, LossOutput, Params, Task


@dataclasses.dataclass(frozen=True)
class StagedTask:
    """A state is scored by the last of `stages` whose variables it has; made by the first.

    It has a stage's variables if its parameters are of the same shapes, and so is whatever else
    the stage keeps in `extra`.

    The updates of a recipe's phases have the stage that trains in each; this is the task of the
    whole, with which the state of any phase is evaluated.
    """

    stages: tuple[Task, ...]

    def init(self, key: jax.Array, batch: Batch) -> tuple[Params, Extra]:
        return self.stages[0].init(key, batch)

    def loss(
        self, params: Params, extra: Extra, batch: Batch, *, key: jax.Array, train: bool
    ) -> LossOutput:
        return self.of(params, extra, batch).loss(params, extra, batch, key=key, train=train)

    def predict(self, params: Params, extra: Extra, batch: Batch, *, key: jax.Array) -> Any:
        return self.of(params, extra, batch).predict(params, extra, batch, key=key)

    def of(self, params: Params, extra: Extra, batch: Batch) -> Any:
        """The stage whose variables these are.

        Raises:
            ConfigError: none has such.
        """

        def shapes(tree: Any) -> Any:
            return jax.tree.map(lambda x: x.shape, tree)

        for stage in reversed(self.stages):
            made = jax.eval_shape(lambda s=stage: s.init(jax.random.key(0), batch))
            kept = {name: extra[name] for name in made[1] if name in extra}
            if shapes(made) == shapes((params, kept)):
                return stage
        raise ConfigError("StagedTask: no stage has parameters of these shapes")
