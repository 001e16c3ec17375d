"""The authors' parameter names as ours."""

from __future__ import annotations

from jaxformer.interop.authors import Tree, Weights, fused_attention, linear


def scale(weights: Weights, name: str) -> Tree:
    """The learned scale (out, 1) of a binary Linear, where it has one."""
    name = f"{name}.scaling_factor"
    return {"scale": weights[name][:, 0]} if name in weights else {}


def binary_linear(weights: Weights, name: str) -> Tree:
    """A binary Linear as an `Einsum` of one axis to one axis."""
    return {**linear(weights, name), **scale(weights, name)}


def attention(weights: Weights, prefix: str, heads: int) -> Tree:
    """`BiAttention_SAB` and `BiAttention_baseline` as an `Attention`; `prefix` ends with a dot."""
    qkv, proj = (binary_linear(weights, prefix + name) for name in ("qkv", "proj"))
    return fused_attention(qkv, proj, heads)


def mlp(weights: Weights, prefix: str) -> Tree:
    """`BiMlp` and its variants as an `MLP`."""
    return {
        "up": binary_linear(weights, f"{prefix}fc1"),
        "down": binary_linear(weights, f"{prefix}fc2"),
    }
