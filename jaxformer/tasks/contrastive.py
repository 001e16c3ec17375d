"""Embeddings of synchronised views: near at the same time, far at others."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxformer.recipe import Batch, Extra, LossOutput, Mean, Params
from jaxformer.tasks import linen


def time_contrastive(
    one_Tx3xD: jax.Array, two_Tx3xD: jax.Array, *, margin: float = 30.0, slip: bool = False
) -> jax.Array:
    """(T,) losses of anchors, positives and negatives in two views.

    The hinge of squared distances within and across views, anchors to positives and the same
    moment in both against anchors to negatives (Shang et al. 2022, arXiv 2206.11895).
    With `slip`, positives and negatives of the second view are those of the first, as in the
    authors' code.
    """
    (a1, p1, n1), (a2, p2, n2) = (jnp.moveaxis(x, 1, 0) for x in (one_Tx3xD, two_Tx3xD))
    if slip:
        p2, n2 = p1, n1

    def d(x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.square(x - y).sum(-1)

    near = d(a1, p1) + d(a2, p2) + d(a1, p2) + d(a2, p1) + d(a1, a2) + d(p1, p2)
    far = d(a1, n1) + d(a2, n2) + d(a1, n2) + d(a2, n1)
    return jax.nn.relu(near - far + margin)


@dataclasses.dataclass(frozen=True)
class AlignTask:
    """The time-contrastive loss of `model`, which embeds images (B, H, W, C) as (B, D).

    Batches are {"views": (B, 2, 3, H, W, C)}: anchor, positive and negative in two views. It also
    `Predicts`: embeddings (B, ..., D) of {"frames": (B, ..., H, W, C)}.
    """

    model: nn.Module
    margin: float = 30.0

    def init(self, key: jax.Array, batch: Batch) -> tuple[Params, Extra]:
        return linen.init(self.model, key, jnp.asarray(batch["views"])[0, 0, :1])

    def loss(
        self, params: Params, extra: Extra, batch: Batch, *, key: jax.Array, train: bool
    ) -> LossOutput:
        views = jnp.asarray(batch["views"])
        images = views.reshape(-1, *views.shape[3:])
        z, extra = linen.apply(self.model, params, extra, images, key=key, train=train)
        z = z.reshape(*views.shape[:3], -1)
        losses = time_contrastive(z[:, 0], z[:, 1], margin=self.margin)
        loss = Mean.of(losses, batch.get("weight"))
        return LossOutput(loss.value(), loss.weight, {"loss": loss}, extra)

    def predict(self, params: Params, extra: Extra, batch: Batch, *, key: jax.Array) -> Any:
        frames = jnp.asarray(batch["frames"])
        images = frames.reshape(-1, *frames.shape[-3:])
        z, _ = linen.apply(self.model, params, extra, images, key=key, train=False)
        return z.reshape(*frames.shape[:-3], -1)
