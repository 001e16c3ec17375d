"""The nonlinear comparison: a decoder that answers after every prefix of the examples.

Tokens are x_1, (y_1, 0 .. 0), x_2, (y_2, 0 .. 0), ...; the answer to x_i is read at its own token
and so sees the pairs before it (Garg et al. 2022, arXiv 2208.01066, section 3).
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxformer.kernels.attention import Causal
from jaxformer.models.encoder import Encoder
from jaxformer.models.transformer import Transformer
from jaxformer.nn.einsum import Einsum
from jaxformer.nn.make import Make
from jaxformer.papers.linear_icl.model import relative_error
from jaxformer.parallel.sharding import constrain
from jaxformer.recipe import Batch, Extra, LossOutput, Mean, Params
from jaxformer.tasks import linen


def interleave(x: jax.Array, y: jax.Array) -> jax.Array:
    """Tokens (B, 2N, d) of the points x (B, N, d), y (B, N)."""
    batch, points, d = x.shape
    labels = jnp.pad(y[..., None], ((0, 0), (0, 0), (0, d - 1)))
    return jnp.stack([x, labels], axis=2).reshape(batch, 2 * points, d)


class InContextTransformer(nn.Module):
    """Points x (B, N, d), y (B, N) to answers (B, N), each from the points before its own."""

    decoder: Make

    @nn.compact
    def __call__(self, x: jax.Array, y: jax.Array, *, train: bool = False) -> jax.Array:
        tokens = interleave(x, y)
        x_BxLxD = self.decoder(name="decoder")(tokens, mask=Causal(), train=train)
        head = Einsum("...D,DC->...C", (1,), out_dtype=jnp.float32, name="head")
        return constrain(head(x_BxLxD[:, ::2])[..., 0], ("batch", "length"))


def in_context_transformer(trunk: Transformer, positions: int) -> InContextTransformer:
    """A decoder for up to `positions` points: 2 `positions` tokens."""
    embed = Make(
        Einsum, equation="...d,dD->...D", features=(trunk.width,), dtype=trunk.compute_dtype
    )
    decoder = Make(
        Encoder,
        embed=embed,
        stack=trunk.stack(),
        position=trunk.stream_position(2 * positions),
        norm=trunk.final_norm(),
        dropout=trunk.dropout,
    )
    return InContextTransformer(decoder)


@dataclasses.dataclass(frozen=True)
class PrefixRegression:
    """(answer - y)^2, the mean over all points of a prompt, the query being the last.

    Batches are those of `jaxformer.data.sources.regression.Prompts`.
    """

    model: InContextTransformer

    def init(self, key: jax.Array, batch: Batch) -> tuple[Params, Extra]:
        x, y = points(batch)
        return linen.init(self.model, key, x[:1], y[:1])

    def loss(
        self, params: Params, extra: Extra, batch: Batch, *, key: jax.Array, train: bool
    ) -> LossOutput:
        x, y = points(batch)
        answers, extra = linen.apply(self.model, params, extra, x, y, key=key, train=train)
        error, weight = answers - y, batch.get("weight")
        loss = Mean.of(error**2, None if weight is None else weight[:, None])
        relative = relative_error(error[:, -1], y[:, -1], weight)
        return LossOutput(
            loss.value(), loss.weight, {"loss": loss, "relative_error": relative}, extra
        )

    def predict(self, params: Params, extra: Extra, batch: Batch, *, key: jax.Array) -> jax.Array:
        """The answers to the queries (B,)."""
        x, y = points(batch)
        return linen.apply(self.model, params, extra, x, y, key=key, train=False)[0][:, -1]


def points(batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Examples and query as x (B, N + 1, d), y (B, N + 1)."""
    x = jnp.concatenate([batch["x"], batch["x_q"][:, None]], axis=1)
    return x, jnp.concatenate([batch["y"], batch["y_q"][:, None]], axis=1)
