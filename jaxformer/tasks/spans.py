"""Extraction: where in a text the answer begins and ends."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jaxformer.recipe import Batch, Extra, Mean, Params
from jaxformer.tasks.answers import AnswerTask, weights_of
from jaxformer.tasks.linen import Answer
from jaxformer.tasks.losses import cross_entropy, is_correct

HIDDEN = -1e9  # the logit of what is no position of the text


@dataclasses.dataclass(frozen=True)
class SpanTask(AnswerTask):
    """Cross-entropy of the first and of the last position of an answer, half of each.

    `model` gives logits (B, 2, L). Batches have {"label": (B, 2) int32}, both 0 (that of [CLS]) in
    a text without the answer, and {"valid": (B, L) bool}: padding is no position, though `predict`
    shows its logits. "accuracy" is the share of rows with both right. As Devlin et al. 2018,
    arXiv 1810.04805, section 4.2.
    """

    def answer(
        self, params: Params, extra: Extra, batch: Batch, *, key: jax.Array, train: bool
    ) -> Answer:
        """The logits, those of padding so small that no softmax sees them."""
        found = super().answer(params, extra, batch, key=key, train=train)
        if "valid" not in batch:
            return found
        valid_BxL = jnp.asarray(batch["valid"])
        return found._replace(output=jnp.where(valid_BxL[:, None], found.output, HIDDEN))

    def score(self, answer: Answer, batch: Batch) -> tuple[Mean, dict[str, Mean]]:
        label_Bx2, logits_Bx2xL = jnp.asarray(batch["label"]), answer.output
        weight = weights_of(batch, 1)
        objective = Mean.of(cross_entropy(logits_Bx2xL, label_Bx2).mean(-1), weight)
        right = is_correct(logits_Bx2xL, label_Bx2).min(-1)
        return objective, {"loss": objective, "accuracy": Mean.of(right, weight)}

    def predict(self, params: Params, extra: Extra, batch: Batch, *, key: jax.Array) -> jax.Array:
        return super().answer(params, extra, batch, key=key, train=False).output
