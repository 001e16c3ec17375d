"""Tasks whose model maps the inputs of a row to an answer, which is scored apart from it."""

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


@dataclasses.dataclass(frozen=True)
class AnswerTask:
    """A `model` from inputs to an answer; abstract: subclasses `score` it. It also `Predicts`.

    Batches are {"image" or "inputs", what `score` reads} and optionally {"weight": (B,)} and
    {"valid": (B, L) bool}, which the model receives as `valid_BxL`.
    """

    model: nn.Module

    def init(self, key: jax.Array, batch: Batch) -> tuple[Params, Extra]:
        inputs, masks = inputs_of(batch)
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
        """What the model says of a batch."""
        inputs, masks = inputs_of(batch)
        return linen.answer(self.model, params, extra, inputs, key=key, train=train, **masks)

    def score(self, answer: Answer, batch: Batch) -> tuple[Mean, dict[str, Mean]]:
        """The objective of an answer, and metrics, which have it too."""
        raise NotImplementedError

    def predict(self, params: Params, extra: Extra, batch: Batch, *, key: jax.Array) -> jax.Array:
        """The output of the model, as in evaluation."""
        return self.answer(params, extra, batch, key=key, train=False).output


def weights_of(batch: Batch, ndim: int) -> jax.Array:
    """The weights of a batch, 1 if it has none, with axes up to `ndim`."""
    weight = jnp.asarray(batch.get("weight", 1.0))
    return weight.reshape(weight.shape + (1,) * (ndim - weight.ndim))


def inputs_of(batch: Batch) -> tuple[jax.Array, dict[str, Any]]:
    """What a model is called with: its inputs, and masks by name.

    Raises:
        ConfigError: the batch has no inputs.
    """
    names = [name for name in ("image", "inputs") if name in batch]
    if not names:
        raise ConfigError(f"batch: needs 'image' or 'inputs', got {sorted(batch)}")
    masks = {"valid_BxL": jnp.asarray(batch["valid"])} if "valid" in batch else {}
    return jnp.asarray(batch[names[0]]), masks
