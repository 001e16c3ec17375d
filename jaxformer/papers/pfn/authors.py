"""The authors' parameter names (torch layout: matrices are (out, in)) as ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

Weights = Mapping[str, jax.Array]


def linear(weights: Weights, name: str) -> dict[str, jax.Array]:
    """A torch Linear as an `Einsum` from one axis to one axis."""
    return {"kernel": weights[f"{name}.weight"].T, "bias": weights[f"{name}.bias"]}


def norm(weights: Weights, name: str) -> dict[str, jax.Array]:
    return {"scale": weights[f"{name}.weight"], "bias": weights[f"{name}.bias"]}


def attention(weights: Weights, name: str, heads: int) -> dict[str, Any]:
    """A torch MultiheadAttention as an `Attention`."""
    kernels = jnp.split(weights[f"{name}.in_proj_weight"].T, 3, axis=1)
    biases = jnp.split(weights[f"{name}.in_proj_bias"], 3)
    out = linear(weights, f"{name}.out_proj")
    width = len(out["bias"])
    found: dict[str, Any] = {
        part: {"kernel": kernel.reshape(width, heads, -1), "bias": bias.reshape(heads, -1)}
        for part, kernel, bias in zip(("query", "key", "value"), kernels, biases, strict=True)
    }
    return {**found, "out": {**out, "kernel": out["kernel"].reshape(heads, -1, width)}}


def set_transformer(weights: Weights, heads: int, layers: int) -> dict[str, Any]:
    """`TransformerModel` as a `SetTransformer`."""

    def block(i: int) -> dict[str, Any]:
        name = f"transformer_encoder.layers.{i}"
        return {
            "mixer": attention(weights, f"{name}.self_attn", heads),
            "mixer_residual": {"norm": norm(weights, f"{name}.norm1")},
            "mlp": {
                "up": linear(weights, f"{name}.linear1"),
                "down": linear(weights, f"{name}.linear2"),
            },
            "mlp_residual": {"norm": norm(weights, f"{name}.norm2")},
        }

    return {
        "x_encoder": linear(weights, "encoder"),
        "y_encoder": {"linear": linear(weights, "y_encoder")},
        "stack": {f"block_{i}": block(i) for i in range(layers)},
        "up": linear(weights, "decoder.0"),
        "head": linear(weights, "decoder.2"),
    }
