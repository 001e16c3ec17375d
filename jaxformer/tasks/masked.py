"""Masked language modelling: fill in words that were taken out."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxformer.recipe import Batch, Extra, LossOutput, Mean, Params
from jaxformer.tasks import linen
from jaxformer.tasks.language import Tokenizer
from jaxformer.tasks.losses import cross_entropy, is_correct


@dataclasses.dataclass(frozen=True)
class MaskedLanguageTask:
    """Cross-entropy of the chosen tokens under `model`, which maps tokens (B, L) to (B, L, V).

    Of the tokens `rate` are chosen, and of these 80 % become `mask_token`, 10 % a random one and
    10 % stay (Devlin et al. 2018, section 3.1). The choice follows from the key of the step, so
    that an evaluation always asks the same. Batches are {"tokens": (B, L)}, optionally with
    "weight" (B,) and "valid" (B, L). It also `Predicts`.
    """

    model: nn.Module
    tokenizer: Tokenizer | None = None
    mask_token: int = 103  # [MASK] of BERT's vocabularies
    rate: float = 0.15

    def init(self, key: jax.Array, batch: Batch) -> tuple[Params, Extra]:
        return linen.init(self.model, key, jnp.asarray(batch["tokens"])[:1])

    def loss(
        self, params: Params, extra: Extra, batch: Batch, *, key: jax.Array, train: bool
    ) -> LossOutput:
        tokens_BxL = jnp.asarray(batch["tokens"])
        choose, how, other, drop = jax.random.split(key, 4)
        chosen = jax.random.bernoulli(choose, self.rate, tokens_BxL.shape)
        valid = {"valid_BxL": jnp.asarray(batch["valid"])} if "valid" in batch else {}
        if valid:
            chosen &= valid["valid_BxL"]
        draw = jax.random.uniform(how, tokens_BxL.shape)
        # A random word stands in for one of the same batch, whose vocabulary is thereby kept to.
        random = jax.random.permutation(other, tokens_BxL.reshape(-1)).reshape(tokens_BxL.shape)
        shown = jnp.where(draw < 0.8, self.mask_token, jnp.where(draw < 0.9, random, tokens_BxL))
        shown = jnp.where(chosen, shown, tokens_BxL)
        logits, extra = linen.apply(
            self.model, params, extra, shown, key=drop, train=train, **valid
        )
        weight = jnp.asarray(batch.get("weight", 1.0))
        weight = chosen * (weight[:, None] if weight.ndim == 1 else weight)
        loss = Mean.of(cross_entropy(logits, tokens_BxL), weight)
        accuracy = Mean.of(is_correct(logits, tokens_BxL), weight)
        return LossOutput(loss.value(), loss.weight, {"loss": loss, "accuracy": accuracy}, extra)

    def predict(self, params: Params, extra: Extra, batch: Batch, *, key: jax.Array) -> jax.Array:
        """Logits (B, L, V) of the tokens as they are."""
        tokens_BxL = jnp.asarray(batch["tokens"])
        valid = {"valid_BxL": jnp.asarray(batch["valid"])} if "valid" in batch else {}
        return linen.apply(self.model, params, extra, tokens_BxL, key=key, train=False, **valid)[0]
