"""Surgery on the heads of trained attention: pure functions of parameters, for `Phase.enter`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax

from jaxformer.errors import ConfigError

PARTS = ("query", "key", "value", "out")
HEADS = -2  # the axis of heads in kernels (D, H, K) and biases (H, K), stacked in layers or not


def map_attention(tree: Any, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Any:
    """`tree` with `change` applied to the parameters of every `Attention` in it.

    Those are a mapping with "query", "key", "value" and "out"; what else it holds is handed on too.
    """
    if not isinstance(tree, Mapping):
        return tree
    inside = {name: map_attention(child, change) for name, child in tree.items()}
    return change(inside) if all(part in inside for part in PARTS) else inside


def pool_key_heads(tree: Any, kv_heads: int) -> Any:
    """Multi-head attention as grouped-query attention with so many key-value heads.

    Each is the mean of a run of consecutive ones (Ainslie et al. 2023, arXiv 2305.13245, section
    2.1); all else stays. Shapes alone decide the result's shapes.

    Raises:
        ConfigError: `kv_heads` does not divide the heads there are, or there is no attention.
    """
    found = []

    def pool(x: jax.Array) -> jax.Array:
        heads, size = x.shape[HEADS:]
        if kv_heads < 1 or heads % kv_heads:
            allowed = ", ".join(str(i) for i in range(1, heads + 1) if heads % i == 0)
            raise ConfigError(
                f"model.kv_heads={kv_heads}: must divide the {heads} key heads of the parameters "
                f"(allowed: {allowed})"
            )
        return x.reshape(*x.shape[:HEADS], kv_heads, heads // kv_heads, size).mean(HEADS)

    def change(attention: dict[str, Any]) -> dict[str, Any]:
        found.append(attention)
        return {
            **attention,
            **{part: jax.tree.map(pool, attention[part]) for part in ("key", "value")},
        }

    changed = map_attention(tree, change)
    if not found:
        raise ConfigError("surgery: the parameters hold no attention (query, key, value, out)")
    return changed
