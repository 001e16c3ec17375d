"""The authors' parameter names as ours."""

from __future__ import annotations

import jax.numpy as jnp

from jaxformer.interop.authors import Tree, Weights, block, from_heads, linear, norm, to_heads

QKV = {"query": "Q", "key": "K", "value": "V"}


def prunable(weights: Weights, prefix: str) -> Tree:
    """`QKV`, kept in the form (size, width, heads), with its `Factors`, those of heads too."""
    found: Tree = {
        ours: {
            "kernel": weights[f"{prefix}{theirs}.weight"].transpose(1, 2, 0),
            "bias": weights[f"{prefix}{theirs}.bias"].T,
        }
        for ours, theirs in QKV.items()
    }
    token, head = (weights[f"{prefix}{name}"] for name in ("token_mask", "head_mask.weight"))
    return {**found, "factors": {"token": token, "head": head[:, 0]}}


def prunable_out(weights: Weights, name: str) -> Tree:
    """`MHTLinear`, (width, size, heads)."""
    return {
        "kernel": weights[f"{name}.weight"].transpose(2, 1, 0),
        "bias": weights[f"{name}.bias"],
    }


def attention(weights: Weights, prefix: str, heads: int) -> Tree:
    """The dense `Attention`, of linear layers, as a `FactoredAttention`."""
    found: Tree = {
        ours: to_heads(linear(weights, f"{prefix}qkv.{theirs}"), heads)
        for ours, theirs in QKV.items()
    }
    found["factors"] = {"token": weights[f"{prefix}qkv.token_mask"]}
    return {**found, "out": from_heads(linear(weights, f"{prefix}proj.proj"), heads)}


def distilled(weights: Weights, heads: list[int], patch: int) -> Tree:
    """`DistilledVisionTransformer_small` as the encoder of a model."""
    kernel = weights["patch_embed.proj.weight"][:, :, 0, 0].T  # of (row, column, channel)
    tokens = [weights[name][0, 0] for name in ("cls_token", "dist_token")]
    projection = {
        "kernel": kernel.reshape(patch, patch, -1, kernel.shape[-1]),
        "bias": weights["patch_embed.proj.bias"],
    }
    stack = {
        f"block_{i}": block(
            attention(weights, f"blocks.{i}.attn.", count),
            norm(weights, f"blocks.{i}.norm1"),
            linear(weights, f"blocks.{i}.mlp.fc1"),
            linear(weights, f"blocks.{i}.mlp.fc2"),
            norm(weights, f"blocks.{i}.norm2"),
        )
        for i, count in enumerate(heads)
    }
    return {
        "embed": {"projection": projection},
        "class_tokens": jnp.stack(tokens),
        "position": {"table": weights["pos_embed"][0]},
        "stack": stack,
        "norm": norm(weights, "norm"),
    }


def heads(weights: Weights) -> Tree:
    """The heads of the class and the distillation token, as those of a `TokenHeads`."""
    both = [linear(weights, name) for name in ("head", "head_dist")]
    return {part: jnp.stack([layer[part] for layer in both]) for part in ("kernel", "bias")}
