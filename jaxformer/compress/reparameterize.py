"""One scale for all channels of a layer's input, moved into the norm before it (RepQ-ViT).

The channels of a norm's output differ in range by far; a quantiser with a scale for each would not
let the product be one of integers. The norm and the kernels after it are changed instead, so that
all channels have one range, and the function stays (Li et al. 2022, arXiv 2212.08254, section 3.3).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Collapse(NamedTuple):
    """How channels change, x -> x / factor - shift, and the one scale and zero point they share."""

    factor_I: jax.Array
    shift_I: jax.Array
    scale: jax.Array
    zero: jax.Array


def collapse(scale_I: jax.Array, zero_I: jax.Array, scale: Any, zero: Any) -> Collapse:
    """R = s_c / s and d = (-z_c s_c) / r + z s for channels of scale s_c and zero point z_c."""
    factor = scale_I / scale
    shift = -zero_I * scale_I / factor + zero * scale
    return Collapse(factor, shift, jnp.asarray(scale), jnp.asarray(zero))


def norm_parameters(norm: Mapping[str, Any], change: Collapse) -> dict[str, Any]:
    """`scale` and `bias` of a norm whose output is to be x / r - d."""
    return {
        "scale": norm["scale"] / change.factor_I,
        "bias": norm["bias"] / change.factor_I - change.shift_I,
    }


def linear_parameters(linear: Mapping[str, Any], change: Collapse) -> dict[str, Any]:
    """`kernel` (I, ...) and `bias` of a map that is to undo it: W r, and b + (W r) d."""
    kernel = linear["kernel"]
    across = (-1,) + (1,) * (kernel.ndim - 1)
    kernel = kernel * change.factor_I.reshape(across)
    bias = linear.get("bias", jnp.zeros(kernel.shape[1:]))
    return {"kernel": kernel, "bias": bias + jnp.tensordot(change.shift_I, kernel, 1)}


def norm_before(path: tuple[str, ...]) -> tuple[str, ...] | None:
    """Where the norm lies that feeds a map, by the map's path; None where none may.

    It is that of a `Block` with norms before its branches, whose mixer may be in windows, or of a
    `PatchMerge`.
    """
    *block, part, name = ("", *path)
    if name == "reduction":
        return (*path[:-1], "norm")
    if (part, name) not in (("mixer", "query"), ("mlp", "up")):
        return None
    while block[-1] == "mixer":
        block.pop()
    return (*block[1:], f"{part}_residual", "norm")


def at(tree: Any, path: tuple[str, ...]) -> Any:
    """The subtree at a path; None where there is none."""
    for name in path:
        if not isinstance(tree, Mapping) or name not in tree:
            return None
        tree = tree[name]
    return tree


def put(tree: Any, path: tuple[str, ...], value: Any) -> Any:
    """A copy of `tree` with `value` at a path."""
    if not path:
        return value
    return {**tree, path[0]: put(tree.get(path[0], {}), path[1:], value)}


def reparameterized(
    params: Any, norm: tuple[str, ...], linears: tuple[tuple[str, ...], ...], change: Collapse
) -> Any:
    """Parameters of the same function, the output of `norm` changed as `change` says."""
    params = put(params, norm, {**at(params, norm), **norm_parameters(at(params, norm), change)})
    for path in linears:
        params = put(params, path, linear_parameters(at(params, path), change))
    return params
