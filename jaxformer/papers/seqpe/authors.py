"""The authors' parameter names as ours."""

from __future__ import annotations

import jax.numpy as jnp

from jaxformer.interop.authors import (
    Tree,
    Weights,
    conv1d,
    fused_attention,
    gpt2_block,
    linear,
    norm,
    to_heads,
)


def encoder(weights: Weights, heads: int, depth: int) -> Tree:
    """`SequentialPE` of the text and of the image code."""
    norms = ("layernorm_1", "layernorm_2")
    blocks = {
        f"block_{i}": gpt2_block(weights, f"transformers.{i}.", heads, norms) for i in range(depth)
    }
    found = {
        "digits": {"table": weights["token_of_seqpe_embed.weight"]},
        "places": weights["pos_of_seqpe_embed.weight"],
        "last": weights["cls_token_embed"][0, 0],
        "stack": blocks,
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
    halves = {name: jnp.split(x, 2, axis=-1) for name, x in layer.items()}
    heads = layer["kernel"].shape[-1] // (2 * head_size)
    return {
        part: to_heads({name: half[i] for name, half in halves.items()}, heads)
        for i, part in enumerate(("query", "key"))
    }


def gpt2_attention(weights: Weights, heads: int) -> Tree:
    """`GPT2Attention`, whose matrices are (in, out)."""
    fused, out = (conv1d(weights, name) for name in ("c_attn", "c_proj"))
    return fused_attention(fused, out, heads)


def vit_attention(weights: Weights, heads: int) -> Tree:
    """`Attention` of the image code."""
    return fused_attention(linear(weights, "qkv"), linear(weights, "proj"), heads)
