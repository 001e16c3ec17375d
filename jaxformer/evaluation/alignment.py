"""How well the embeddings of two films of the same happening tell its moments.

Metrics of Sermanet et al. 2018 (arXiv 1704.06888) and Dwibedi et al. 2019 (arXiv 1904.07846).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxformer.evaluation.evaluators import placed_batches
from jaxformer.parallel.multihost import everywhere
from jaxformer.recipe import Batch, Data, EvalContext, Predicts, TrainState
from jaxformer.train.states import on_device


def nearest(z1: np.ndarray, z2: np.ndarray) -> np.ndarray:
    """(l,) for each row of z1 (l, D) the row of z2 (m, D) nearest to it, the first of equals."""
    distances = np.square(z1[:, None].astype(np.float64) - z2[None]).sum(-1)
    return distances.argmin(1)


def alignment_error(z1: np.ndarray, z2: np.ndarray) -> float:
    """Mean distance in time of the nearest row, as a fraction of the length."""
    return float(np.abs(np.arange(len(z1)) - nearest(z1, z2)).mean() / len(z1))


def cycle_error(z1: np.ndarray, z2: np.ndarray) -> float:
    """The same of the way to the other film and back."""
    back = nearest(z2, z1)[nearest(z1, z2)]
    return float(np.abs(np.arange(len(z1)) - back).mean() / len(z1))


def kendalls_tau(z1: np.ndarray, z2: np.ndarray) -> float:
    """Pairs of moments that the nearest rows have in the same order, less the others, over all.

    Two moments with the same nearest row are out of order.
    """
    found = nearest(z1, z2)
    i, j = np.triu_indices(len(found), 1)
    return float(2 * (found[i] < found[j]).mean() - 1)


@dataclasses.dataclass(frozen=True)
class Alignment:
    """Alignment error, cycle error and Kendall's tau, means over `batches` batches of film pairs.

    `films` gives {"frames": (B, 2, l, H, W, C)}; all of a finite one if `batches` is None.
    """

    task: Predicts
    films: Data
    batches: int | None = None
    every: int | Literal["phase_end", "end"] = "end"
    name: str = "alignment"
    metrics: tuple[Callable[[Any, Any], float], ...] = (alignment_error, cycle_error, kendalls_tau)

    def __call__(self, state: TrainState, context: EvalContext) -> dict[str, float]:
        @jax.jit
        def embed(batch: Batch) -> tuple[jax.Array, jax.Array]:
            batch = on_device(self.films, batch)
            z = self.task.predict(state.params, state.extra, batch, key=jax.random.key(0))
            return z, jnp.asarray(batch.get("weight", jnp.ones(len(z))))

        found = []
        for batch in placed_batches(self.films, context, self.batches):
            z, weight = embed(batch)
            pairs, weight = everywhere(z), everywhere(weight)
            found += [[m(*pair) for m in self.metrics] for pair in pairs[weight > 0]]
        means = np.mean(found, axis=0)
        return {m.__name__: float(x) for m, x in zip(self.metrics, means, strict=True)}
