"""The authors' parameter names as ours."""

from __future__ import annotations

from jaxformer.interop.authors import (
    Tree,
    Weights,
    block,
    conv1d,
    fused_attention,
    linear,
    norm,
    to_heads,
)


def encoder(weights: Weights, heads: int, depth: int) -> Tree:
    """`SequentialPE` of the text and of the image code."""

    def one(i: int) -> Tree:
        name = f"transformers.{i}."
        fused, out = (conv1d(weights, f"{name}attn.{part}") for part in ("c_attn", "c_proj"))
        return block(
            fused_attention(fused, out, heads),
            norm(weights, f"{name}layernorm_1"),
            conv1d(weights, f"{name}mlp.c_fc"),
            conv1d(weights, f"{name}mlp.c_proj"),
            norm(weights, f"{name}layernorm_2"),
        )

    found = {
        "digits": {"table": weights["token_of_seqpe_embed.weight"]},
        "places": weights["pos_of_seqpe_embed.weight"],
        "last": weights["cls_token_embed"][0, 0],
        "stack": {f"block_{i}": one(i) for i in range(depth)},
        "project": linear(weights, "out_proj"),
    }
    if "layernorm.weight" in weights:
        found["norm"] = norm(weights, "layernorm")
    if "dim_token_embed" in weights:
        found["axes"] = weights["dim_token_embed"][:, 0]
    return found


def pair(weights: Weights, head_size: int) -> Tree:
    """`pe_qk` as a `Pair`: queries first."""
    layer = linear(weights, "pe_qk")
    return {"qk": to_heads(layer, layer["kernel"].shape[-1] // head_size)}


def gpt2_attention(weights: Weights, heads: int) -> Tree:
    """`GPT2Attention`, whose matrices are (in, out)."""
    fused, out = (conv1d(weights, name) for name in ("c_attn", "c_proj"))
    return fused_attention(fused, out, heads)


def vit_attention(weights: Weights, heads: int) -> Tree:
    """`Attention` of the image code."""
    return fused_attention(linear(weights, "qkv"), linear(weights, "proj"), heads)
