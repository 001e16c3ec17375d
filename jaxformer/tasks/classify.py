"""Classification of whole inputs, or of each of their positions."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxformer.errors import ConfigError
from jaxformer.recipe import Batch, Extra, LossOutput, Mean, Params
from jaxformer.tasks import linen
from jaxformer.tasks.losses import cross_entropy, is_correct


@dataclasses.dataclass(frozen=True)
class ClassifyTask:
    """Cross-entropy of `model`, which maps inputs to class logits (B, C). It also `Predicts`.

    Logits (B, L, C) and labels (B, L), with weights (B,) or (B, L), give every position a class.
    Batches are {"image" or "inputs", "label": (B,) int32} and optionally {"weight": (B,)} and
    {"valid": (B, L) bool}, which the model receives as `valid_BxL`.
    """

    model: nn.Module
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.label_smoothing < 1.0:
            raise ConfigError(
                f"ClassifyTask.label_smoothing={self.label_smoothing}: must be in [0, 1)"
            )

    def init(self, key: jax.Array, batch: Batch) -> tuple[Params, Extra]:
        inputs, masks = _inputs(batch)
        masks = {name: mask[:1] for name, mask in masks.items()}
        return linen.init(self.model, key, inputs[:1], **masks)

    def loss(
        self, params: Params, extra: Extra, batch: Batch, *, key: jax.Array, train: bool
    ) -> LossOutput:
        inputs, masks = _inputs(batch)
        logits_BxC, extra = linen.apply(
            self.model, params, extra, inputs, key=key, train=train, **masks
        )
        label, weight = jnp.asarray(batch["label"]), jnp.asarray(batch.get("weight", 1.0))
        weight = weight.reshape(weight.shape + (1,) * (label.ndim - weight.ndim))
        objective = Mean.of(cross_entropy(logits_BxC, label, self.label_smoothing), weight)
        accuracy = Mean.of(is_correct(logits_BxC, label), weight)
        metrics = {"loss": objective, "accuracy": accuracy}
        return LossOutput(objective.value(), objective.weight, metrics, extra)

    def predict(self, params: Params, extra: Extra, batch: Batch, *, key: jax.Array) -> jax.Array:
        """Logits (B, C) or (B, L, C)."""
        inputs, masks = _inputs(batch)
        return linen.apply(self.model, params, extra, inputs, key=key, train=False, **masks)[0]


def _inputs(batch: Batch) -> tuple[jax.Array, dict[str, Any]]:
    names = [name for name in ("image", "inputs") if name in batch]
    if not names:
        raise ConfigError(f"batch: ClassifyTask reads 'image' or 'inputs', got {sorted(batch)}")
    masks = {"valid_BxL": jnp.asarray(batch["valid"])} if "valid" in batch else {}
    return jnp.asarray(batch[names[0]]), masks
