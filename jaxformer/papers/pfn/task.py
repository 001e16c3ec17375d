"""The objective: the likelihood of the queries' targets under the prior over data sets."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jaxformer.papers.pfn.criteria import Criterion
from jaxformer.papers.pfn.model import SetTransformer, zero_branches
from jaxformer.recipe import Batch, Extra, LossOutput, Mean, Params
from jaxformer.tasks import linen


@dataclasses.dataclass(frozen=True)
class PFNTask:
    """Mean negative log likelihood of the rows from n on: the paper's prior-data NLL.

    Batches are those of `priors.DataSets`: {"x" (B, T, F), "y" (B, T), "target" (B, T), "n" (B,)},
    optionally with "weight" (B,).
    """

    model: SetTransformer
    criterion: Criterion

    def init(self, key: jax.Array, batch: Batch) -> tuple[Params, Extra]:
        model_key, criterion_key = jax.random.split(key)
        x, y, n = (batch[name][:1] for name in ("x", "y", "n"))
        params, extra = linen.init(self.model, model_key, x, y, n)
        return zero_branches(params), {**extra, **self.criterion.init(criterion_key)}

    def loss(
        self, params: Params, extra: Extra, batch: Batch, *, key: jax.Array, train: bool
    ) -> LossOutput:
        x, y, n = (jnp.asarray(batch[name]) for name in ("x", "y", "n"))
        output, extra = linen.apply(self.model, params, extra, x, y, n, key=key, train=train)
        is_query = jnp.arange(x.shape[1]) >= n[:, None]
        weight = is_query * jnp.asarray(batch.get("weight", 1.0)).reshape(-1, 1)
        nll = Mean.of(self.criterion.nll(extra, output, batch["target"]), weight)
        return LossOutput(nll.value(), nll.weight, {"nll": nll}, extra)

    def predict(self, params: Params, extra: Extra, batch: Batch, *, key: jax.Array) -> jax.Array:
        """The outputs (B, T, n_out) of all rows; those from n on are predictions."""
        del key
        return self.model.apply({"params": params}, batch["x"], batch["y"], batch["n"])
