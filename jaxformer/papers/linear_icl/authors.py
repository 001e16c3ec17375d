"""Parameter names of `TransformerModel` of dtsip/in-context-learning as ours.

Its `Linear` weights are (out, in), the `Conv1D` ones of its GPT-2 (c_attn, c_proj, c_fc) (in, out).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

Weights = Mapping[str, jax.Array]


def transformer(weights: Weights, heads: int, layers: int) -> dict[str, Any]:
    """Its weights as the parameters of an `InContextTransformer`."""
    backbone = {k.removeprefix("_backbone."): v for k, v in weights.items()}
    blocks = {f"block_{i}": _block(backbone, f"h.{i}.", heads) for i in range(layers)}
    return {
        "decoder": {
            "embed": _linear(weights, "_read_in"),
            "position": {"table": backbone["wpe.weight"]},
            "stack": blocks,
            "norm": _norm(backbone, "ln_f"),
        },
        "head": _linear(weights, "_read_out"),
    }


def _block(weights: Weights, name: str, heads: int) -> dict[str, Any]:
    def to_heads(x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:-1], heads, -1)

    fused, out = _conv(weights, f"{name}attn.c_attn"), _conv(weights, f"{name}attn.c_proj")
    width = out["kernel"].shape[-1]
    mixer: dict[str, Any] = {"out": {**out, "kernel": out["kernel"].reshape(heads, -1, width)}}
    for i, part in enumerate(("query", "key", "value")):
        mixer[part] = {k: to_heads(jnp.split(x, 3, axis=-1)[i]) for k, x in fused.items()}
    return {
        "mixer": mixer,
        "mixer_residual": {"norm": _norm(weights, f"{name}ln_1")},
        "mlp": {
            "up": _conv(weights, f"{name}mlp.c_fc"),
            "down": _conv(weights, f"{name}mlp.c_proj"),
        },
        "mlp_residual": {"norm": _norm(weights, f"{name}ln_2")},
    }


def _linear(weights: Weights, name: str) -> dict[str, jax.Array]:
    return {"kernel": weights[f"{name}.weight"].T, "bias": weights[f"{name}.bias"]}


def _conv(weights: Weights, name: str) -> dict[str, jax.Array]:
    return {"kernel": weights[f"{name}.weight"], "bias": weights[f"{name}.bias"]}


def _norm(weights: Weights, name: str) -> dict[str, jax.Array]:
    return {"scale": weights[f"{name}.weight"], "bias": weights[f"{name}.bias"]}
