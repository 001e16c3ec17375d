"""The authors' parameter names as ours."""

from __future__ import annotations

from ml_collections import ConfigDict

from jaxformer.interop import authors
from jaxformer.interop.authors import Tree, Weights, block, linear, norm

ATTENTION = ("query_projection", "key_projection", "value_projection", "out_projection")


def read(config: ConfigDict, weights: Weights) -> Tree:
    """`FlowFormer_GPT` as the language model of a config."""
    return language_model(weights, config.model.heads, config.model.depth)


def attention(weights: Weights, prefix: str, heads: int) -> Tree:
    """`Flow_Attention` and `Flow_Attention_Causal` as `FlowAttention`."""
    return authors.attention(weights, prefix, ATTENTION, heads)


def vision_block(weights: Weights, heads: int) -> Tree:
    """`My_BlockLayerScale` as a `Block` whose MLP branch alone is scaled."""
    found = authors.vit_block(weights, "", heads)
    found["mlp_residual"]["layer_scale"] = weights["gamma"]
    return found


def language_model(weights: Weights, heads: int, layers: int) -> Tree:
    """`FlowFormer_GPT` as a `DecoderLM`; all its matrices are Linears."""

    def one(i: int) -> Tree:
        name = f"transformer.h.{i}."
        return block(
            attention(weights, f"{name}attn.", heads),
            norm(weights, f"{name}ln_1"),
            linear(weights, f"{name}mlp.c_fc"),
            linear(weights, f"{name}mlp.c_proj"),
            norm(weights, f"{name}ln_2"),
        )

    return {
        "embed": {"table": weights["transformer.wte.weight"]},
        "position": {"table": weights["transformer.wpe.weight"]},
        "stack": {f"block_{i}": one(i) for i in range(layers)},
        "norm": norm(weights, "transformer.ln_f"),
        "head": linear(weights, "lm_head"),
    }
