"""The contract of jaxformer: what a paper gives, what the loop takes. Read this first.

A paper gives a `Task` (how to make parameters, how to score a batch; both pure). A `Recipe` is a
task plus a list of `Phase`s; a phase is data, an `Update` and a number of steps, and may
restructure the state when it is entered. An `Update` is one jitted function
`(TrainState, batch) -> (TrainState, metrics)`. `jaxformer.fit` knows nothing else.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxformer.errors import ConfigError as ConfigError

Params = Any  # nested dict of arrays
Extra = Any  # nested dict of non-trained variables: "ema", "batch_stats", "masks", "observers", ...
Batch = Mapping[str, Any]  # arrays with a leading global-batch axis


class Metric(Protocol):
    """A commutative monoid: micro-batches, padding, hosts and evaluation batches add up exactly."""

    def merge(self, other: Any) -> Any: ...

    def value(self) -> jax.Array: ...


class Mean(NamedTuple):
    """A weighted sum and its weight, the commonest `Metric`."""

    total: jax.Array
    weight: jax.Array

    @classmethod
    def of(cls, values: jax.typing.ArrayLike, weights: jax.typing.ArrayLike | None = None) -> Mean:
        """Sum `values` (any shape) with `weights` (broadcast to it; 1 when absent), in float32."""
        x = jnp.asarray(values, jnp.float32)
        if weights is None:
            return cls(x.sum(), jnp.asarray(x.size, jnp.float32))
        w = jnp.broadcast_to(jnp.asarray(weights, jnp.float32), x.shape)
        # where, not *: an ignored element may be NaN and must not reach the sum.
        return cls(jnp.where(w == 0, 0.0, x * w).sum(), w.sum())

    def merge(self, other: Mean) -> Mean:
        return Mean(self.total + other.total, self.weight + other.weight)

    def value(self) -> jax.Array:
        """The mean; 0 where nothing was weighed."""
        return self.total / (self.weight + (self.weight == 0))


Metrics = Mapping[str, Metric]


class LossOutput(NamedTuple):
    """The objective of one batch.

    `loss` is the scalar mean to differentiate, `weight` the number of scored elements it was
    averaged over (tokens, pixels, edges), `extra` the new non-trained variables.
    """

    loss: jax.Array
    weight: jax.Array
    metrics: Metrics
    extra: Extra


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything a run needs to continue: arrays only, no functions."""

    step: jax.Array  # int32 scalar, global over all phases
    params: Params
    extra: Extra
    opt_state: Any
    key: jax.Array  # base key, constant; the key of a step is fold_in(key, step)

    def replace(self, **changes: Any) -> TrainState:
        return dataclasses.replace(self, **changes)


class Task(Protocol):
    """What a paper defines: parameters and a score, both pure functions."""

    def init(self, key: jax.Array, batch: Batch) -> tuple[Params, Extra]:
        """Parameters and extra variables for batches shaped like `batch` (any number of rows)."""
        ...

    def loss(
        self, params: Params, extra: Extra, batch: Batch, *, key: jax.Array, train: bool
    ) -> LossOutput:
        """Score one batch. Rows whose batch["weight"] is 0 are padding and change nothing."""
        ...


@runtime_checkable
class Predicts(Protocol):
    """A task that can answer: `predict` gives the paper's output for a batch."""

    def predict(self, params: Params, extra: Extra, batch: Batch, *, key: jax.Array) -> Any: ...


@runtime_checkable
class Generates(Protocol):
    """A task that continues token sequences one position at a time, with state of its own."""

    def encode(self, text: str) -> list[int]: ...

    def decode(self, tokens: Sequence[int]) -> str: ...

    def start(self, params: Params, extra: Extra, *, batch_size: int, length: int) -> Any:
        """An empty decode state for `batch_size` sequences of at most `length` tokens."""
        ...

    def advance(
        self, params: Params, extra: Extra, state: Any, tokens: jax.Array
    ) -> tuple[jax.Array, Any]:
        """Read `tokens` (B, L) int32; return the logits (B, V) after the last, and the state."""
        ...


@runtime_checkable
class Denoises(Protocol):
    """A task that tells the noise in an example: samplers walk its process backwards."""

    @property
    def process(self) -> Any: ...

    def check(self, given: Batch) -> None:
        """Refuse conditions that the model does not know."""
        ...

    def absent(self, given: Batch) -> Batch:
        """The conditions that say nothing, for guidance."""
        ...

    def examples(self, count: int) -> Batch:
        """Conditions to show, `count` rows of them."""
        ...

    def denoise(
        self, params: Params, extra: Extra, x: jax.Array, time: jax.Array, given: Batch
    ) -> jax.Array:
        """What the process asks of examples x (B, ...) at times (B,), under the conditions."""
        ...

    def decode(self, extra: Extra, latent: jax.Array) -> jax.Array: ...


class Update(Protocol):
    """One transition of the train state; jitted, sharded and donated by the loop."""

    def init(self, state: TrainState) -> TrainState:
        """Add what this update keeps (`opt_state`, `extra["ema"]`); pure and shape-inferable."""
        ...

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]: ...


class Data(Protocol):
    """Global batches as a pure function of (seed, step): nothing but `step` is ever saved."""

    @property
    def batch_size(self) -> int: ...

    def batch(self, step: int, rows: slice = slice(None)) -> Batch:
        """Rows of global batch `step` as numpy arrays; the same on any number of hosts."""
        ...

    def spec(self) -> Batch:
        """The whole batch as `jax.ShapeDtypeStruct`s, known without reading any file.

        A run can so be shown, planned and lowered where its data is not.
        """
        ...


class FiniteData(Data, Protocol):
    """Data with an end, for evaluation: batches 0 .. len - 1."""

    def __len__(self) -> int: ...


@runtime_checkable
class DrawsOnDevice(Protocol):
    """Data whose `batch` is only an address; `draw` makes the arrays inside the jitted step."""

    def draw(self, batch: Batch) -> Batch: ...


@dataclasses.dataclass(frozen=True)
class EvalContext:
    """Where an evaluator runs."""

    mesh: Mesh
    phase: str
    workdir: Any = None  # a path, local or not
    alive: Callable[[], object] = lambda: None  # called now and then, by those that take long


class Evaluator(Protocol):
    """A measurement of a state. `every` is a step interval, or "phase_end", or "end"."""

    @property
    def name(self) -> str: ...

    @property
    def every(self) -> int | Literal["phase_end", "end"]: ...

    def __call__(self, state: TrainState, context: EvalContext) -> Mapping[str, float]: ...


def identity(state: TrainState) -> TrainState:
    return state


@dataclasses.dataclass(frozen=True)
class Phase:
    """A stretch of training, calibration, surgery or gradient flow.

    `enter` runs once before the first step: pure and shape-inferable, so that a checkpoint of any
    phase can be restored without running the phases before it. A choice that decides shapes is
    made by an earlier scoring phase.
    """

    name: str
    steps: int = 0
    data: Data | None = None  # None: the update reads no batch (a population loss)
    update: Update | None = None
    enter: Callable[[TrainState], TrainState] = identity


@dataclasses.dataclass(frozen=True)
class InitFrom:
    """Start from the parameters of another run: `mapping` rewrites paths, (regex, replacement).

    Paths are "a/b/kernel". A leaf of this recipe that no saved leaf maps to keeps its
    initialisation only if it matches `fresh`; otherwise the restore fails and names it.
    """

    workdir: str
    step: int | None = None
    mapping: Sequence[tuple[str, str]] = ()
    fresh: str = r"(?!)"


@dataclasses.dataclass(frozen=True, eq=False)
class Recipe:
    """A reproducible experiment."""

    task: Task
    phases: Sequence[Phase]
    evaluators: Sequence[Evaluator] = ()
    sharding: Sequence[tuple[str, str]] = ()  # (name regex, logical axes), over the library's
    init_from: InitFrom | None = None
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # what it was built from
    unit: str = "examples"  # what `LossOutput.weight` counts

    def __post_init__(self) -> None:
        names = [phase.name for phase in self.phases]
        if not names or len(set(names)) != len(names):
            raise ConfigError(f"Recipe.phases: names must be unique and at least one, got {names}")
        for phase in self.phases:
            if phase.steps < 0 or (phase.steps and phase.update is None):
                raise ConfigError(
                    f"Phase {phase.name!r}: steps={phase.steps} needs steps >= 0 and an update"
                )

    @property
    def steps(self) -> int:
        """Steps of all phases together."""
        return sum(phase.steps for phase in self.phases)


@dataclasses.dataclass(frozen=True)
class Findings:
    """What an experiment found: named numbers, tables (name -> rows) and figures (files)."""

    values: Mapping[str, float]
    tables: Mapping[str, Sequence[Mapping[str, Any]]] = dataclasses.field(default_factory=dict)
    figures: Sequence[Path] = ()


@dataclasses.dataclass(frozen=True)
class Claim:
    """A statement of the paper, the experiment that measures it and the figure to beat.

    `experiment` receives a `jaxformer.evaluate.claims.Lab` (seed, workdir, configs, fit); claims
    that name the same function share one run of it. `value` is a key of `Findings.values`.
    """

    says: str
    source: str
    experiment: Callable[[Any], Findings]
    value: str
    at_least: float | None = None
    at_most: float | None = None
    baseline: str = ""

    def __post_init__(self) -> None:
        if (self.at_least is None) == (self.at_most is None):
            raise ConfigError(f"Claim {self.value!r}: give exactly one of at_least, at_most")

    def met(self, value: float) -> bool:
        """Whether `value` reaches the figure; NaN never does."""
        if self.at_least is not None:
            return value >= self.at_least
        return self.at_most is not None and value <= self.at_most
