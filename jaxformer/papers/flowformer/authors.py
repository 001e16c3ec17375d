"""The authors' parameter names (torch layout: matrices are (out, in)) as ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

Weights = Mapping[str, jax.Array]
PROJECTIONS = {"query": "query_projection", "key": "key_projection", "value": "value_projection"}


def linear(weights: Weights, name: str) -> dict[str, jax.Array]:
    """A torch Linear as an `Einsum` from one axis to one axis."""
    bias = {"bias": weights[f"{name}.bias"]} if f"{name}.bias" in weights else {}
    return {"kernel": weights[f"{name}.weight"].T, **bias}


def norm(weights: Weights, name: str) -> dict[str, jax.Array]:
    return {"scale": weights[f"{name}.weight"], "bias": weights[f"{name}.bias"]}


def to_heads(layer: Mapping[str, jax.Array], heads: int) -> dict[str, jax.Array]:
    """A projection D -> H K, with the head axes split."""
    return {name: x.reshape(*x.shape[:-1], heads, -1) for name, x in layer.items()}


def from_heads(layer: Mapping[str, jax.Array], heads: int) -> dict[str, jax.Array]:
    """A projection H K -> D, with the head axes split."""
    kernel = layer["kernel"]
    return {"kernel": kernel.reshape(heads, -1, kernel.shape[-1]), "bias": layer["bias"]}


def attention(weights: Weights, prefix: str, heads: int) -> dict[str, Any]:
    """`Flow_Attention` and `Flow_Attention_Causal` as `FlowAttention`."""
    found: dict[str, Any] = {
        ours: to_heads(linear(weights, prefix + theirs), heads)
        for ours, theirs in PROJECTIONS.items()
    }
    return {**found, "out": from_heads(linear(weights, f"{prefix}out_projection"), heads)}


def vision_block(weights: Weights, heads: int) -> dict[str, Any]:
    """`My_BlockLayerScale` as a `Block` whose MLP branch alone is scaled."""
    fused = linear(weights, "attn.qkv")
    kernels, biases = (jax.numpy.split(fused[name], 3, axis=-1) for name in ("kernel", "bias"))
    mixer: dict[str, Any] = {
        name: to_heads({"kernel": kernel, "bias": bias}, heads)
        for name, kernel, bias in zip(("query", "key", "value"), kernels, biases, strict=True)
    }
    return {
        "mixer": {**mixer, "out": from_heads(linear(weights, "attn.proj"), heads)},
        "mixer_residual": {"norm": norm(weights, "norm1")},
        "mlp": {"up": linear(weights, "mlp.fc1"), "down": linear(weights, "mlp.fc2")},
        "mlp_residual": {"norm": norm(weights, "norm2"), "layer_scale": weights["gamma"]},
    }


def language_model(weights: Weights, heads: int, layers: int) -> dict[str, Any]:
    """`FlowFormer_GPT` as a `DecoderLM`."""

    def block(i: int) -> dict[str, Any]:
        name = f"transformer.h.{i}."
        return {
            "mixer": attention(weights, f"{name}attn.", heads),
            "mixer_residual": {"norm": norm(weights, f"{name}ln_1")},
            "mlp": {
                "up": linear(weights, f"{name}mlp.c_fc"),
                "down": linear(weights, f"{name}mlp.c_proj"),
            },
            "mlp_residual": {"norm": norm(weights, f"{name}ln_2")},
        }

    return {
        "embed": {"table": weights["transformer.wte.weight"]},
        "position": {"table": weights["transformer.wpe.weight"]},
        "stack": {f"block_{i}": block(i) for i in range(layers)},
        "norm": norm(weights, "transformer.ln_f"),
        "head": linear(weights, "lm_head"),
    }
