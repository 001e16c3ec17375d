"""Generalisation to other lengths: how many answers are right as a whole, length by length."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Literal

import jax
import jax.numpy as jnp

from jaxformer.evaluation.evaluators import placed_batches
from jaxformer.recipe import (
    Batch,
    Data,
    EvalContext,
    Extra,
    Mean,
    Metrics,
    Params,
    Predicts,
    TrainState,
)
from jaxformer.train.states import on_device
from jaxformer.train.updates import merge


def exact_match(
    logits_BxLxV: jax.Array, targets_BxL: jax.Array, scored_BxL: jax.Array
) -> jax.Array:
    """(B,) 1.0 where every scored token has the largest of its logits, float32.

    With logits read after the true tokens, that is where greedy decoding writes the whole answer:
    as long as it is right, it has read the same.
    """
    right = logits_BxLxV.argmax(-1) == targets_BxL
    return (right | (scored_BxL == 0)).all(-1).astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class LengthSweep:
    """The share of answers that greedy decoding gets right as a whole, at each of several lengths.

    `examples(length)` is data of {"tokens": (B, L + 1), "weight": (B, L)}, whose scored tokens are
    the answer, its end included; `task.predict` gives the logits (B, L, V) of tokens 1 .. L. Gives
    {"exact_30": ..., "token_30": ...}, of whole answers and of their tokens; rows without a scored
    token do not count. Where L is the same for all lengths the model is compiled once.
    """

    task: Predicts
    examples: Callable[[int], Data]
    lengths: tuple[int, ...]
    batches: int = 1
    name: str = "lengths"
    every: int | Literal["phase_end", "end"] = "end"

    def __post_init__(self) -> None:
        for length in self.lengths:
            self.examples(length)  # what cannot be made is refused now, not after the training

    @functools.cached_property
    def _score(self) -> Callable[..., Metrics]:
        def score(params: Params, extra: Extra, batch: Batch) -> Metrics:
            logits = self.task.predict(params, extra, batch, key=jax.random.key(0))
            targets, scored = jnp.asarray(batch["tokens"])[:, 1:], jnp.asarray(batch["weight"])
            right = (logits.argmax(-1) == targets).astype(jnp.float32)
            return {
                "exact": Mean.of(exact_match(logits, targets, scored), (scored > 0).any(-1)),
                "token": Mean.of(right, scored),
            }

        return jax.jit(score)

    def __call__(self, state: TrainState, context: EvalContext) -> Mapping[str, float]:
        found = {}
        for length in self.lengths:
            data, totals = self.examples(length), {}
            draw = jax.jit(functools.partial(on_device, data))
            for batch in placed_batches(data, context, self.batches):
                scores = self._score(state.params, state.extra, draw(batch))
                totals = merge(totals, jax.device_get(scores))
            found |= {f"{name}_{length}": float(mean.value()) for name, mean in totals.items()}
        return found
