"""Regression: one number for each row."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from jaxformer.errors import ConfigError
from jaxformer.recipe import Batch, Mean
from jaxformer.tasks.answers import AnswerTask, weights_of
from jaxformer.tasks.linen import Answer


@dataclasses.dataclass(frozen=True)
class RegressTask(AnswerTask):
    """Mean squared error of `model`, whose one output (B, 1) is the score itself, in its units.

    Batches have {"label": (B,) float32}. As BERT is fine-tuned on STS-B.

    Raises:
        ConfigError: the model has more outputs than one.
    """

    def score(self, answer: Answer, batch: Batch) -> tuple[Mean, dict[str, Mean]]:
        if answer.output.shape[1:] != (1,):
            raise ConfigError(
                f"RegressTask.model: gives {answer.output.shape[1:]} for a row; must have 1 output"
            )
        score_B = answer.output[:, 0].astype(jnp.float32)
        error_B = jnp.square(score_B - jnp.asarray(batch["label"], jnp.float32))
        objective = Mean.of(error_B, weights_of(batch, 1))
        return objective, {"loss": objective}
