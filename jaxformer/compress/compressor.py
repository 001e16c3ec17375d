"""Methods that make a trained model smaller or faster, one after the other: links of a chain.

A paper offers its method as `compressor(argument)`; `jaxformer compress` finds what decides the
model's shapes on calibration data, and a config of the compressed run keeps it. A run's recipe and
what was found are all that its compressed recipe is made of.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from jaxformer.compress.calibration import CalibrationUpdate, completed, opened
from jaxformer.compress.integer import QuantizedModel
from jaxformer.compress.intercepted import prepared
from jaxformer.compress.packed import has_packed, pack_kernels
from jaxformer.compress.quantized import COLLECTION, Quantized
from jaxformer.compress.reconstruction import Reconstruction, reconstruct
from jaxformer.data.base import FixedData
from jaxformer.errors import ConfigError
from jaxformer.evaluation.evaluators import MeanEvaluator
from jaxformer.recipe import Batch, Extra, Params, Phase, Recipe, Task, TrainState
from jaxformer.train.states import first_data

Facts = Mapping[str, Any]  # JSON: what decides shapes
PHASE = "compressed"


@runtime_checkable
class HasModel(Protocol):
    """A task of one model, with `predict` and `loss`, that another model may take the place of."""

    model: Any


class Compressor(Protocol):
    """A method at one setting. `note` is what a reader of its measurements must know."""

    note: str

    def find(
        self, task: Any, params: Params, extra: Extra, batch: Batch
    ) -> tuple[Params, Extra, Facts]:
        """Compress the variables of `task`, looking at a batch of examples."""
        ...

    def task(self, task: Any, found: Facts) -> Any:
        """The same task of the compressed model: pure, and `init` gives the shapes of `find`'s."""
        ...


@dataclasses.dataclass(frozen=True)
class Calibrated:
    """Quantisation after training: `rules` say of what, the `procedure` finds their states.

    With a `reconstruction` blocks then learn their rounding on the examples calibrated on.
    """

    rules: Quantized
    procedure: Any  # Callable[[Params], ChangesParameters]
    reconstruction: Reconstruction | None = None
    note: str = "maps of uniform codes in integers, all else fake quantisation: rounded, in float32"

    def find(
        self, task: Any, params: Params, extra: Extra, batch: Batch
    ) -> tuple[Params, Extra, Facts]:
        check_unpacked(params)
        task = opened(task)
        params = completed(task, params, batch)
        update = CalibrationUpdate(task, self.rules, FixedData(batch), self.procedure)
        state, _ = update(TrainState(0, params, extra, {}, None), batch)  # type: ignore[arg-type]
        check_same(task, params, state.params, extra, batch)
        params, extra = state.params, state.extra
        if self.reconstruction:
            key, how = jax.random.key(0), self.reconstruction
            params, states, _ = reconstruct(task, self.rules, how, params, extra, batch, key)
            extra = {**extra, COLLECTION: states}
        variables = pack_kernels({**extra, "params": params}, self.rules)
        return variables.pop("params"), variables, {}

    def task(self, task: Any, found: Facts) -> Any:
        del found
        task = opened(task)
        return dataclasses.replace(task, model=QuantizedModel(task.model, self.rules))


def bits_of(argument: str, least: int = 2) -> tuple[int, int]:
    """The bits of weights and of activations: (4, 8) of "w4a8".

    Raises:
        ConfigError: it reads otherwise, or they are not from `least` to 8.
    """
    match = re.fullmatch(r"w(\d+)a(\d+)", argument)
    bits = (int(match[1]), int(match[2])) if match else (0, 0)
    if not all(least <= b <= 8 for b in bits):
        raise ConfigError(
            f"method: {argument!r} must read like w4a4, bits of weights and of activations, both "
            f"from {least} to 8"
        )
    return bits


def steps_of(argument: str) -> tuple[str, int]:
    """("w4a4", 200) of "w4a4r200", in which every block is reconstructed in 200 steps, else 0."""
    match = re.fullmatch(r"(.*?)(?:r(\d+))?", argument)
    assert match is not None
    return match[1], int(match[2] or 0)


def share_of(argument: str, what: str, low: float, high: float) -> float:
    """A number strictly between two, such as the share of FLOPs that is left.

    Raises:
        ConfigError: it is none.
    """
    try:
        value = float(argument)
    except ValueError:
        value = low
    if not low < value < high:
        raise ConfigError(
            f"method: {argument!r} must be {what}, a number between {low:g} and {high:g}"
        )
    return value


def check_unpacked(params: Params) -> None:
    """Refuse parameters that another method has packed.

    Raises:
        ConfigError: some are.
    """
    if has_packed(params):
        raise ConfigError(
            "method: the parameters have been packed by a method before; one that changes weights "
            "comes before the quantiser in a chain"
        )


def check_same(task: Any, before: Params, after: Params, extra: Extra, batch: Batch) -> None:
    """Hold surgery that moves scales between norms and maps to the function that it must keep.

    Raises:
        ConfigError: two examples are answered otherwise, by more than a hundredth.
    """
    few = {name: x[:2] for name, x in batch.items()}
    predict = jax.jit(lambda params: task.predict(params, extra, few, key=jax.random.key(0)))
    whole, moved = (predict(params) for params in (before, after))
    if not jnp.abs(whole - moved).max() <= 1e-2 * jnp.abs(whole).max():
        raise ConfigError(
            "method: would change what this model computes, whose norms do not stand before its "
            "branches alone, or whose maps have no bias; take another method"
        )


def ready(task: Any, params: Params, extra: Extra) -> tuple[Params, Extra]:
    """Variables of a task for many answers (`intercepted.prepared`)."""
    variables = dict(prepared(task.model, {**extra, "params": params}))
    return variables.pop("params"), variables


def check_fits(task: Task, params: Params, extra: Extra, batch: Batch) -> None:
    """Hold variables to the shapes that the task itself would give them.

    Raises:
        ConfigError: naming the first that differs.
    """

    def shapes(tree: Any) -> dict[str, Any]:
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        return {jax.tree_util.keystr(p, simple=True, separator="/"): x.shape for p, x in leaves}

    made = shapes(jax.eval_shape(lambda b: task.init(jax.random.key(0), b), batch))
    given = shapes((params, extra))
    wrong = [name for name in {**made, **given} if made.get(name) != given.get(name)]
    if wrong:
        raise ConfigError(
            f"method: {wrong[0].partition('/')[2]!r} became {given.get(wrong[0], 'nothing')}, the "
            f"model has {made.get(wrong[0], 'nothing')}; the method does not know this model"
        )


def compressed(
    recipe: Recipe, stage: int | None, links: Sequence[tuple[Compressor, Facts]]
) -> Recipe:
    """The recipe of a compressed run: nothing to train, the evaluators of the original.

    `stage` is which of a `StagedTask`'s was compressed.
    """
    task: Any = recipe.task
    task = task if stage is None else task.stages[stage]
    for compressor, found in links:
        task = compressor.task(task, found)
    evaluators = [
        dataclasses.replace(e, task=task)
        for e in recipe.evaluators
        if isinstance(e, MeanEvaluator) and e.task == recipe.task
    ]
    phase = Phase(PHASE, data=first_data(recipe))
    return Recipe(task, [phase], evaluators, recipe.sharding, unit=recipe.unit)
