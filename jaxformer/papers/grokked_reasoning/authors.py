"""The authors' parameter names as ours: those of GPT-2 in the `transformers` library."""

from __future__ import annotations

from ml_collections import ConfigDict

from jaxformer.interop.authors import Tree, Weights, gpt2_block, norm


def read(config: ConfigDict, weights: Weights) -> Tree:
    """A checkpoint as the language model of a config.

    The authors' tokens follow GPT-2's 50,257: take those rows of the table, and of the positions
    the first `data.context`.
    """
    return language_model(weights, config.model.heads, config.model.depth)


def language_model(weights: Weights, heads: int, layers: int) -> Tree:
    """`GPT2LMHeadModel`, whose output matrix is the embedding, as a `DecoderLM`."""
    return {
        "embed": {"table": weights["transformer.wte.weight"]},
        "position": {"table": weights["transformer.wpe.weight"]},
        "stack": {
            f"block_{i}": gpt2_block(weights, f"transformer.h.{i}.", heads) for i in range(layers)
        },
        "norm": norm(weights, "transformer.ln_f"),
    }
