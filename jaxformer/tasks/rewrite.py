"""Sequence to sequence: write a text, given another."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxformer.recipe import Batch, Extra, LossOutput, Mean, Params
from jaxformer.tasks import linen
from jaxformer.tasks.language import Tokenizer, named_tokenizer
from jaxformer.tasks.losses import cross_entropy, is_correct


@dataclasses.dataclass(frozen=True)
class RewriteTask:
    """Cross-entropy of the next token under `model` (an `EncoderDecoder`), given the inputs.

    Batches are {"inputs": (B, S), "tokens": (B, L + 1)}, the first token being the one that
    starts a text; optionally "valid" (B, S) and "weight" (B,) or (B, L). It `Predicts`, and
    `Generates` from an `extra` in which `reading` has put what is to be rewritten.
    """

    model: nn.Module
    tokenizer: Tokenizer | None = None

    def init(self, key: jax.Array, batch: Batch) -> tuple[Params, Extra]:
        inputs, tokens, valid = _parts(batch)
        valid = {name: x[:1] for name, x in valid.items()}
        return linen.init(self.model, key, inputs[:1], tokens[:1, :-1], **valid)

    def loss(
        self, params: Params, extra: Extra, batch: Batch, *, key: jax.Array, train: bool
    ) -> LossOutput:
        inputs, tokens, valid = _parts(batch)
        logits, extra = linen.apply(
            self.model, params, extra, inputs, tokens[:, :-1], key=key, train=train, **valid
        )
        weight = jnp.asarray(batch.get("weight", 1.0))
        weight = weight[:, None] if weight.ndim == 1 else weight
        loss = Mean.of(cross_entropy(logits, tokens[:, 1:]), weight)
        accuracy = Mean.of(is_correct(logits, tokens[:, 1:]), weight)
        return LossOutput(loss.value(), loss.weight, {"loss": loss, "accuracy": accuracy}, extra)

    def predict(self, params: Params, extra: Extra, batch: Batch, *, key: jax.Array) -> jax.Array:
        """Logits (B, L, V) of the tokens after each of the first L."""
        inputs, tokens, valid = _parts(batch)
        return linen.apply(
            self.model, params, extra, inputs, tokens[:, :-1], key=key, train=False, **valid
        )[0]

    def reading(
        self, params: Params, extra: Extra, inputs: jax.Array, valid: jax.Array | None = None
    ) -> Extra:
        """`extra` with the memory of `inputs` (B, S), one row per prompt, for `generate`."""
        inputs = jnp.asarray(inputs)
        valid = jnp.ones(inputs.shape, bool) if valid is None else jnp.asarray(valid)
        read = functools.partial(self.model.apply, method="read")
        return {**extra, "memory": read({"params": params}, inputs, valid_BxS=valid), "seen": valid}

    def encode(self, text: str) -> list[int]:
        return [int(token) for token in named_tokenizer(self).encode(text)]

    def decode(self, tokens: Sequence[int]) -> str:
        return named_tokenizer(self).decode(tokens)

    def start(self, params: Params, extra: Extra, *, batch_size: int, length: int) -> Any:
        del params
        tokens = jnp.zeros((batch_size, length), jnp.int32)
        options = {"valid_BxS": extra["seen"], "decode": True, "method": "write"}
        return self.model.init(jax.random.key(0), extra["memory"], tokens, **options)["cache"]

    def advance(
        self, params: Params, extra: Extra, state: Any, tokens: jax.Array
    ) -> tuple[jax.Array, Any]:
        options = {"valid_BxS": extra["seen"], "decode": True, "method": "write"}
        logits, changed = self.model.apply(
            {"params": params, "cache": state},
            extra["memory"],
            tokens,
            mutable=["cache"],
            **options,
        )
        return logits[:, -1], changed["cache"]


def _parts(batch: Batch) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
    valid = {"valid_BxS": jnp.asarray(batch["valid"])} if "valid" in batch else {}
    return jnp.asarray(batch["inputs"]), jnp.asarray(batch["tokens"]), valid
