"""A decoder that is asked for a fact and says it, and what is seen inside of it.

The model is GPT-2's with a vocabulary of symbols. With `repeat` its layers run several times with
the same weights (appendix E.2).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxformer.analyze import patching
from jaxformer.evaluation.lengths import exact_match
from jaxformer.models.lm import DecoderLM, decoder_lm
from jaxformer.models.transformer import Transformer
from jaxformer.recipe import Batch, Extra, LossOutput, Mean, Params
from jaxformer.tasks import linen
from jaxformer.tasks.language import LanguageTask
from jaxformer.tasks.losses import cross_entropy


def language_model(trunk: Transformer, vocabulary: int, context: int) -> DecoderLM:
    """Tokens (B, L) to logits (B, L, V) by the embedding's own table."""
    return decoder_lm(trunk, vocabulary=vocabulary, length=context)


@dataclasses.dataclass(frozen=True)
class AnswerTask(LanguageTask):
    """Cross-entropy of the answer and its end alone, and how often both are right.

    "weight" (B, L) is 0 on the question. As what is right so far decides what is read next, "exact"
    is how often greedy decoding writes the answer to its end.
    """

    def loss(
        self, params: Params, extra: Extra, batch: Batch, *, key: jax.Array, train: bool
    ) -> LossOutput:
        tokens, weight_BxL = jnp.asarray(batch["tokens"]), jnp.asarray(batch["weight"])
        inputs_BxL, targets_BxL = tokens[:, :-1], tokens[:, 1:]
        logits, extra = linen.apply(self.model, params, extra, inputs_BxL, key=key, train=train)
        loss = Mean.of(cross_entropy(logits, targets_BxL), weight_BxL)
        exact = Mean.of(exact_match(logits, targets_BxL, weight_BxL), weight_BxL.max(-1))
        return LossOutput(loss.value(), loss.weight, {"loss": loss, "exact": exact}, extra)


def reciprocal_ranks(
    model: DecoderLM,
    params: Params,
    inputs_BxL: jax.Array,
    wanted: Sequence[tuple[int, jax.Array]],
) -> jax.Array:
    """(depth + 1, len(wanted)): how high the stream of each layer ranks symbols (section 4).

    `wanted` are (position, symbols (B,)); of the ranks, from 1, the mean of the inverse.
    """
    lens = patching.logit_lens(model, {"params": params}, inputs_BxL)
    ranks = [patching.rank(lens[:, :, at], symbols[None]) for at, symbols in wanted]
    return jnp.stack([(1 / (1 + rank)).mean(-1) for rank in ranks], -1)


def altered(
    model: DecoderLM,
    params: Params,
    inputs_BxL: jax.Array,
    perturbed_BxL: jax.Array,
    positions: Sequence[Sequence[int]],
    valid_B: jax.Array | None = None,
) -> jax.Array:
    """(depth, positions): how often a patched state changes the prediction at the last position.

    Of the examples that are `valid` and whose perturbed input has another answer.
    """
    variables = {"params": params}

    def says(logits: jax.Array) -> jax.Array:
        return logits[:, -1].argmax(-1)

    before, other = (says(model.apply(variables, x)) for x in (inputs_BxL, perturbed_BxL))
    after = patching.causal_trace(
        model, variables, inputs_BxL, perturbed_BxL, positions=positions, measure=says
    )
    counts = before != other
    if valid_B is not None:
        counts &= valid_B
    return jnp.where(counts, after != before, False).sum(-1) / jnp.maximum(counts.sum(), 1)
