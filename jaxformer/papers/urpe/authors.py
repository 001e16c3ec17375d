"""The authors' parameter names as ours."""

from __future__ import annotations

from jaxformer.interop import authors
from jaxformer.interop.authors import Tree, Weights, block, linear, norm

ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")


def attention(weights: Weights, prefix: str, heads: int) -> Tree:
    """`MultiheadAttention` as an `Attention`."""
    return authors.attention(weights, prefix, ATTENTION, heads)


def sentence_encoder(weights: Weights, heads: int, layers: int) -> Tree:
    """`TransformerSentenceEncoder` as the encoder of `model.encoder`."""

    def one(i: int) -> Tree:
        name = f"layers.{i}."
        return block(
            attention(weights, f"{name}self_attn.", heads),
            norm(weights, f"{name}self_attn_layer_norm"),
            linear(weights, f"{name}fc1"),
            linear(weights, f"{name}fc2"),
            norm(weights, f"{name}final_layer_norm"),
        )

    return {
        "embed": {
            "tokens": {"table": weights["embed_tokens.weight"]},
            "norm": norm(weights, "emb_layer_norm"),
        },
        "stack": {f"block_{i}": one(i) for i in range(layers)},
        "scheme": {
            "bias": weights["rp_bias.weight"],
            "scale": weights["ur_rp_bias.weight"],
        },
    }
