"""Classification of whole inputs, or of each of their positions."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from jaxformer.errors import ConfigError
from jaxformer.recipe import Batch, Mean
from jaxformer.tasks.answers import AnswerTask, weights_of
from jaxformer.tasks.linen import Answer
from jaxformer.tasks.losses import cross_entropy, is_correct


@dataclasses.dataclass(frozen=True)
class ClassifyTask(AnswerTask):
    """Cross-entropy of `model`, which maps inputs to class logits (B, C).

    Logits (B, L, C) and labels (B, L), with weights (B,) or (B, L), give every position a class.
    Batches are {"image" or "inputs", "label": (B,) int32} and optionally {"weight": (B,)} and
    {"valid": (B, L) bool}, which the model receives as `valid_BxL`.
    """

    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.label_smoothing < 1.0:
            raise ConfigError(
                f"ClassifyTask.label_smoothing={self.label_smoothing}: must be in [0, 1)"
            )

    def score(self, answer: Answer, batch: Batch) -> tuple[Mean, dict[str, Mean]]:
        logits_BxC, label = answer.output, jnp.asarray(batch["label"])
        weight = weights_of(batch, label.ndim)
        objective = Mean.of(cross_entropy(logits_BxC, label, self.label_smoothing), weight)
        accuracy = Mean.of(is_correct(logits_BxC, label), weight)
        return objective, {"loss": objective, "accuracy": accuracy}
