"""Does a model learn in context by gradient descent? The protocol, for any language model.

The demonstrations are read in several orders, and trained on in the same orders; what comes out is
compared (Shen, Mishra, Khashabi, arXiv 2310.08540, sections 4 and 5). p (R, C, Q, V) are the
answers of R orders at C moments of training to Q queries.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxformer.errors import ConfigError
from jaxformer.evaluation import few_shot
from jaxformer.evaluation.few_shot import FewShot, Prompts
from jaxformer.recipe import Batch, Extra, LossOutput, Params
from jaxformer.train import optim
from jaxformer.train.updates import GradientUpdate

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Descent:
    """A way of training on demonstrations: `rows` at a time, 0 for all of them.

    Of the parameters those are trained whose names match `trains`.
    """

    optimizer: str = "sgd"
    rows: int = 0
    trains: str = ""

    def update(self, task: Any, rate: Any) -> GradientUpdate:
        """Steps of a constant rate, which may be traced, without weight decay.

        Raises:
            ConfigError: no such optimiser.
        """
        factories = {"sgd": optim.sgd, "adam": optim.adamw}
        if self.optimizer not in factories:
            raise ConfigError(
                f"optimizer={self.optimizer!r}: must be one of {', '.join(factories)}"
            )
        groups = few_shot.only(self.trains) if self.trains else ()
        found = optim.optimizer(factories[self.optimizer](), lambda step: rate, groups=groups)
        return GradientUpdate(Undropped(task), found)


DESCENTS: Mapping[str, Descent] = {
    "full batch": Descent(),
    "batch 1": Descent(rows=1),
    "batch 2": Descent(rows=2),
    "batch 4": Descent(rows=4),
    "adam": Descent("adam"),
}


@dataclasses.dataclass(frozen=True)
class Undropped:
    """A task that is trained without dropout."""

    task: Any

    def init(self, key: Array, batch: Batch) -> tuple[Params, Extra]:
        return self.task.init(key, batch)

    def loss(
        self, params: Params, extra: Extra, batch: Batch, *, key: Array, train: bool
    ) -> LossOutput:
        del train
        return self.task.loss(params, extra, batch, key=key, train=False)


class Training(NamedTuple):
    """For how long: `epochs`, and the answers are seen after each `every` of them."""

    epochs: int = 200
    every: int = 20

    @property
    def moments(self) -> list[int]:
        return list(range(0, self.epochs + 1, self.every))


PAPER = Training()


def trained(
    task: Any,
    params: Params,
    extra: Extra,
    examples: Batch,
    zero: Prompts,
    order: Array,
    rate: Any,
    descent: Descent,
    training: Training,
    rows: int | None = None,
) -> Array:
    """P (C, Q, V) of the prompts `zero`, which hold a query alone, as training goes.

    The first are before training. A pure function of arrays, to be mapped over orders.

    Raises:
        ConfigError: epochs are not a multiple of `every`, or examples not of the descent's rows.
    """
    epochs, every = training
    if every < 1 or epochs % every:
        raise ConfigError(f"every={every}: must divide the {epochs} epochs")
    count = order.shape[-1]
    batch = descent.rows or count
    if count % batch:
        raise ConfigError(f"rows: {batch} does not divide the {count} examples")

    def observe(params: Params, extra: Extra) -> Array:
        return few_shot.answers(task, params, extra, zero, rows)

    # One round goes through all examples `every` times.
    return few_shot.descend(
        descent.update(task, rate),
        params,
        extra,
        examples,
        jnp.tile(order, every),
        observe,
        epochs=epochs // every,
        rows=batch,
    )


def measured(p_icl: Array, p_gd: Array, labels: Array, k: int = 10) -> dict[str, Array]:
    """{measure: (C,)} of answers in context (R, Q, V) and by descent (R, C, Q, V).

    Those of the same order are compared.
    """

    def one(p: Array) -> dict[str, Array]:  # (R, Q, V)
        def each(p: Array, q: Array) -> dict[str, Array]:
            return {
                "accuracy": few_shot.accuracy(p, labels),
                "likelihood": p[jnp.arange(len(labels)), labels].mean(),
                "overlap": few_shot.token_overlap(p, q, k),
                "cosine": few_shot.overlap_cosine(p, q, k),
            }

        found = {name: x.mean() for name, x in jax.vmap(each)(p, p_icl).items()}
        return found | {"sensitivity": few_shot.sensitivity(p)}

    return jax.vmap(one, in_axes=1)(p_gd)


def in_context(p_icl: Array, p_zero: Array, labels: Array, k: int = 10) -> dict[str, Array]:
    """What answers in context (R, Q, V) are, beside each other and those without demonstrations.

    "overlap" and "cosine" are of two orders that follow each other: no other algorithm can be
    closer to it than it is to itself.
    """
    other = jnp.roll(p_icl, 1, axis=0)
    shift = jax.vmap(lambda p, q: few_shot.token_overlap(p, q, k))
    cosine = jax.vmap(lambda p, q: few_shot.overlap_cosine(p, q, k))
    zeros = jnp.broadcast_to(p_zero, p_icl.shape)
    return {
        "accuracy": jax.vmap(lambda p: few_shot.accuracy(p, labels))(p_icl).mean(),
        "sensitivity": few_shot.sensitivity(p_icl),
        "overlap": shift(p_icl, other).mean(),
        "cosine": cosine(p_icl, other).mean(),
        "zero_shot": few_shot.accuracy(p_zero, labels),
        "zero_shot_overlap": shift(p_icl, zeros).mean(),
    }


class Chosen(NamedTuple):
    """A rate and a moment of training, and what was measured there."""

    rate: float
    epoch: int
    found: Mapping[str, float]


def best(
    rates: Sequence[float],
    training: Training,
    curves: Mapping[str, np.ndarray],
    by: Sequence[str] = ("accuracy", "likelihood"),
) -> Chosen:
    """The rate and the moment whose `by` is highest; curves are (rates, C).

    The moment before training is not chosen. Of equals by the first the second decides.
    """
    values = [np.asarray(curves[name])[:, 1:] for name in by]
    order = np.lexsort([x.ravel() for x in reversed(values)])
    rate, moment = np.unravel_index(order[-1], values[0].shape)
    found = {name: float(x[rate, moment + 1]) for name, x in curves.items()}
    return Chosen(float(rates[rate]), training.moments[moment + 1], found)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """All of it, of one model and one set of demonstrations: see `compare`."""

    orders: int = 10
    rates: Sequence[float] = (1e-5, 5e-5, 1e-4, 5e-4)
    training: Training = PAPER
    descents: Mapping[str, Descent] = dataclasses.field(
        default_factory=lambda: {n: DESCENTS[n] for n in ("full batch", "batch 1", "adam")}
    )
    k: int = 10
    rows: int | None = None  # prompts that are read at a time
    seed: int = 0

    def __call__(
        self, task: Any, params: Params, extra: Extra, few: FewShot
    ) -> tuple[dict[str, float], dict[str, dict[str, np.ndarray]]]:
        """Numbers of reading in context; and for each descent {measure: (rates, C)}.

        Orders are trained on one after the other, so of a large model there is only one more.

        Raises:
            ConfigError: there are not so many orders, or a prompt is too long.
        """
        turns = few_shot.orders(self.orders, len(few.demonstrations), self.seed)
        labels, zero = jnp.asarray(few.labels), few.prompts(())
        read = jax.jit(lambda p, e, prompts: few_shot.answers(task, p, e, prompts, self.rows))
        p_icl = jnp.stack([read(params, extra, few.prompts(turn)) for turn in turns])
        p_zero = read(params, extra, zero)
        icl = {name: float(x) for name, x in in_context(p_icl, p_zero, labels, self.k).items()}
        curves = {}
        for name, descent in self.descents.items():
            run = self._descent(task, few, descent)
            by_rate = [
                self._one_rate(functools.partial(run, params, extra, rate), turns, p_icl, labels)
                for rate in self.rates
            ]
            curves[name] = {m: np.stack([found[m] for found in by_rate]) for m in by_rate[0]}
        return icl, curves

    def _descent(self, task: Any, few: FewShot, descent: Descent) -> Any:
        """P (C, Q, V) of parameters, a rate and an order, compiled once."""
        examples, zero = few.examples(), few.prompts(())

        def run(params: Params, extra: Extra, rate: Any, order: Array) -> Array:
            return trained(
                task,
                params,
                extra,
                examples,
                zero,
                order,
                rate,
                descent,
                self.training,
                self.rows,
            )

        return jax.jit(run)

    def _one_rate(
        self, run: Any, turns: np.ndarray, p_icl: Array, labels: Array
    ) -> dict[str, np.ndarray]:
        """{measure: (C,)}; of all orders only sums of the answers are kept."""
        pieces = []
        # About the answers of the first order: squares of small differences do not round away.
        first = total = square = None
        for turn, p in zip(turns, p_icl, strict=True):
            q = run(jnp.asarray(turn))
            found = measured(p[None], q[None], labels, self.k)
            pieces.append(jax.device_get(found))
            if first is None:
                first, total, square = q, jnp.zeros_like(q), jnp.zeros_like(q)
            total, square = total + (q - first), square + (q - first) ** 2
        count = len(turns)
        spread = jnp.sqrt(jnp.maximum(square / count - (total / count) ** 2, 0))
        mean = {name: np.mean([piece[name] for piece in pieces], axis=0) for name in pieces[0]}
        return mean | {"sensitivity": np.asarray(spread.sum(-1).mean(-1))}
