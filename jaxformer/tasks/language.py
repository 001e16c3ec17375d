"""Language modelling: predict the next token."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxformer.errors import ConfigError
from jaxformer.kernels.attention import Causal, Segments
from jaxformer.recipe import Batch, Extra, LossOutput, Mean, Params
from jaxformer.tasks import linen
from jaxformer.tasks.losses import cross_entropy, is_correct


class Tokenizer(Protocol):
    """Text to tokens and back."""

    def encode(self, text: str) -> Sequence[int] | np.ndarray: ...

    def decode(self, tokens: Sequence[int]) -> str: ...


@dataclasses.dataclass(frozen=True)
class LanguageTask:
    """Next-token cross-entropy of `model`, which maps tokens (B, L) to logits (B, L, V).

    Batches are {"tokens": (B, L + 1) int32} and optionally {"weight": (B,) or (B, L)}, the weight
    of each predicted token. With {"segment": (B, L + 1)} tokens look at those of their own segment
    only. A `Task` that also `Predicts` and `Generates`; prompts given as text need the `tokenizer`.
    """

    model: nn.Module
    tokenizer: Tokenizer | None = None

    def init(self, key: jax.Array, batch: Batch) -> tuple[Params, Extra]:
        return linen.init(self.model, key, jnp.asarray(batch["tokens"])[:1, :-1])

    def loss(
        self, params: Params, extra: Extra, batch: Batch, *, key: jax.Array, train: bool
    ) -> LossOutput:
        tokens = jnp.asarray(batch["tokens"])
        inputs_BxL, targets_BxL = tokens[:, :-1], tokens[:, 1:]
        options = _own_segment(batch)
        logits_BxLxV, extra = linen.apply(
            self.model, params, extra, inputs_BxL, key=key, train=train, **options
        )
        weight = jnp.asarray(batch.get("weight", 1.0))
        weight = weight[:, None] if weight.ndim == 1 else weight
        loss = Mean.of(cross_entropy(logits_BxLxV, targets_BxL), weight)
        accuracy = Mean.of(is_correct(logits_BxLxV, targets_BxL), weight)
        return LossOutput(loss.value(), loss.weight, {"loss": loss, "accuracy": accuracy}, extra)

    def predict(self, params: Params, extra: Extra, batch: Batch, *, key: jax.Array) -> jax.Array:
        """Logits (B, L, V) of the tokens after each of the first L."""
        inputs_BxL = jnp.asarray(batch["tokens"])[:, :-1]
        options = {"key": key, "train": False, **_own_segment(batch)}
        return linen.apply(self.model, params, extra, inputs_BxL, **options)[0]

    def encode(self, text: str) -> list[int]:
        return [int(token) for token in named_tokenizer(self).encode(text)]

    def decode(self, tokens: Sequence[int]) -> str:
        return named_tokenizer(self).decode(tokens)

    def start(self, params: Params, extra: Extra, *, batch_size: int, length: int) -> Any:
        del params, extra
        return linen.start_cache(self.model, batch_size, length)

    def advance(
        self, params: Params, extra: Extra, state: Any, tokens: jax.Array
    ) -> tuple[jax.Array, Any]:
        logits_BxLxV, state = linen.decode(self.model, params, extra, state, tokens)
        return logits_BxLxV[:, -1], state


def _own_segment(batch: Batch) -> dict[str, Any]:
    """The mask that keeps packed examples apart, where a batch has them."""
    if "segment" not in batch:
        return {}
    segment_BxL = jnp.asarray(batch["segment"])[:, :-1]
    return {"mask": Causal() & Segments(segment_BxL, segment_BxL)}


def named_tokenizer(task: Any) -> Tokenizer:
    """The tokenizer of a task that needs one for text.

    Raises:
        ConfigError: it has none.
    """
    if task.tokenizer is None:
        raise ConfigError(
            f"{type(task).__name__}.tokenizer=None: needed for text; give one, or prompts as tokens"
        )
    return task.tokenizer
