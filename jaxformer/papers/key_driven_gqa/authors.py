"""The authors' parameter names as ours."""

from __future__ import annotations

from jaxformer.interop import authors
from jaxformer.interop.authors import Tree, Weights, from_heads, linear, to_heads


def grouped(weights: Weights, prefix: str, heads: int, kv_heads: int) -> Tree:
    """`GQA`, `KDGQA`, `DGQA` and `PGQA` as an `Attention`."""
    parts = {"query": ("q", heads), "key": ("k", kv_heads), "value": ("v", kv_heads)}
    found = {
        ours: to_heads(linear(weights, prefix + theirs), count)
        for ours, (theirs, count) in parts.items()
    }
    return {**found, "out": from_heads(linear(weights, f"{prefix}proj"), heads)}


def multi_head(weights: Weights, prefix: str, heads: int) -> Tree:
    """The attention of the `timm` library, whose ViTs are converted."""
    fused, out = (linear(weights, prefix + name) for name in ("qkv", "proj"))
    return authors.fused_attention(fused, out, heads)


def names_of(attention: Tree) -> dict[str, object]:
    """An `Attention` by the authors' names for grouped attention, as they lie there."""
    found = {}
    for ours, theirs in (("query", "q"), ("key", "k"), ("value", "v")):
        layer = attention[ours]
        found[f"{theirs}.weight"] = layer["kernel"].reshape(layer["kernel"].shape[0], -1).T
        found[f"{theirs}.bias"] = layer["bias"].reshape(-1)
    out = attention["out"]
    found["proj.weight"] = out["kernel"].reshape(-1, out["kernel"].shape[-1]).T
    return {**found, "proj.bias": out["bias"]}
