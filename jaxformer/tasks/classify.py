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
from jaxformer.tasks.linen import Answer
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
        found = self.answer(params, extra, batch, key=key, train=train)
        objective, metrics = self.score(found, batch)
        return LossOutput(objective.value(), objective.weight, metrics, found.extra)

    def answer(
        self, params: Params, extra: Extra, batch: Batch, *, key: jax.Array, train: bool
    ) -> Answer:
        """The logits of a batch."""
        inputs, masks = _inputs(batch)
        return linen.answer(self.model, params, extra, inputs, key=key, train=train, **masks)

    def score(self, answer: Answer, batch: Batch) -> tuple[Mean, dict[str, Mean]]:
        """The objective of an answer, and metrics, which have it too."""
        logits_BxC, label = answer.output, jnp.asarray(batch["label"])
        weight = weights_of(batch, label.ndim)
        objective = Mean.of(cross_entropy(logits_BxC, label, self.label_smoothing), weight)
        accuracy = Mean.of(is_correct(logits_BxC, label), weight)
        return objective, {"loss": objective, "accuracy": accuracy}

    def predict(self, params: Params, extra: Extra, batch: Batch, *, key: jax.Array) -> jax.Array:
        """Logits (B, C) or (B, L, C)."""
        return self.answer(params, extra, batch, key=key, train=False).output


def weights_of(batch: Batch, ndim: int) -> jax.Array:
    """The weights of a batch, 1 if it has none, with axes up to `ndim`."""
    weight = jnp.asarray(batch.get("weight", 1.0))
    return weight.reshape(weight.shape + (1,) * (ndim - weight.ndim))


def _inputs(batch: Batch) -> tuple[jax.Array, dict[str, Any]]:
    names = [name for name in ("image", "inputs") if name in batch]
    if not names:
        raise ConfigError(f"batch: ClassifyTask reads 'image' or 'inputs', got {sorted(batch)}")
    masks = {"valid_BxL": jnp.asarray(batch["valid"])} if "valid" in batch else {}
    return jnp.asarray(batch[names[0]]), masks
