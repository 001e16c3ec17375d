"""Outliers put into a trained model without changing what it computes: tests of quantisers.

A few channels of large Transformers are tens of times larger than the others, which ruins ranges
shared with them (Dettmers et al. 2022, arXiv 2208.07339, section 3). Small models have none, but a
channel may be multiplied where it is written and divided where it is read. These are pure
functions of parameters, of layers that are stacked or not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxformer.errors import ConfigError
from jaxformer.nn.surgery import map_attention

# What reads a norm, and the axis of channels in its kernel, counted from the end.
MIXER_READERS = {"query": -3, "key": -3, "value": -3}
MLP_READERS = {"up": -2, "gate": -2}


def draw_channels(width: int, count: int, seed: int | Sequence[int] = 0) -> tuple[int, ...]:
    """`count` different channels out of `width`, in order.

    Raises:
        ConfigError: there are not so many.
    """
    if not 0 <= count <= width:
        raise ConfigError(f"outliers.count={count}: must be from 0 to the width {width}")
    drawn = np.random.default_rng(seed).choice(width, count, replace=False)
    return tuple(sorted(int(channel) for channel in drawn))


def at_norms(params: Any, channels: Sequence[int], factor: float) -> Any:
    """Outliers in what every norm of a `Block` hands on: its channels times `factor`.

    The matching rows of the query, key, value, up and gate kernels that follow are divided by it.
    That keeps the function of pre-norm blocks alone: the norms of others are read by the stream
    too. Which they are, parameters do not tell.

    Raises:
        ConfigError: no such channel, a factor that is not positive, or no blocks.
    """
    _check_factor(factor)
    found: list[Any] = []
    changed = _at_norms(params, tuple(channels), factor, found)
    if not found:
        raise ConfigError(
            "outliers: the parameters hold no block (mixer, mixer_residual/norm) with attention"
        )
    return changed


def _at_norms(tree: Any, channels: tuple[int, ...], factor: float, found: list[Any]) -> Any:
    if not isinstance(tree, Mapping):
        return tree
    node = {name: _at_norms(child, channels, factor, found) for name, child in tree.items()}
    for branch, readers in (("mixer", MIXER_READERS), ("mlp", MLP_READERS)):
        residual = node.get(f"{branch}_residual")
        if branch not in node or not isinstance(residual, Mapping) or "norm" not in residual:
            continue
        divided, count = _divided(node[branch], readers, channels, factor)
        if not count:
            continue  # another kind of mixer
        gain = {name: _times(x, -1, channels, factor) for name, x in residual["norm"].items()}
        node |= {branch: divided, f"{branch}_residual": {**residual, "norm": gain}}
        found.append(branch)
    return node


def _divided(
    tree: Any, readers: Mapping[str, int], channels: tuple[int, ...], factor: float
) -> tuple[Any, int]:
    """A mixer or MLP whose reading kernels have rows divided, and how many kernels those are."""
    if not isinstance(tree, Mapping):
        return tree, 0
    here = [name for name in readers if name in tree and "kernel" in tree[name]]
    if here:
        new = {}
        for name in here:
            kernel = _times(tree[name]["kernel"], readers[name], channels, 1 / factor)
            new[name] = {**tree[name], "kernel": kernel}
        return {**tree, **new}, len(here)
    parts = {name: _divided(child, readers, channels, factor) for name, child in tree.items()}
    return {name: x for name, (x, _) in parts.items()}, sum(n for _, n in parts.values())


def at_values(params: Any, channels: Sequence[int], factor: float) -> Any:
    """Outliers in what attention mixes: these channels of every head's values times `factor`.

    The matching rows of the output kernels are divided by it. Any model with softmax attention
    keeps its function, with grouped heads too.

    Raises:
        ConfigError: no such channel in a head, a factor that is not positive, or no attention.
    """
    _check_factor(factor)
    chosen, found = tuple(channels), []

    def change(attention: dict[str, Any]) -> dict[str, Any]:
        found.append(attention)
        value = {name: _times(x, -1, chosen, factor) for name, x in attention["value"].items()}
        kernel = _times(attention["out"]["kernel"], -2, chosen, 1 / factor)
        return {**attention, "value": value, "out": {**attention["out"], "kernel": kernel}}

    changed = map_attention(params, change)
    if not found:
        raise ConfigError("outliers: the parameters hold no attention (query, key, value, out)")
    return changed


def _times(x: jax.Array, axis: int, channels: tuple[int, ...], factor: float) -> jax.Array:
    """X with those channels of an axis, counted from the end, times `factor`."""
    size = x.shape[axis]
    outside = [channel for channel in channels if not 0 <= channel < size]
    if outside:
        raise ConfigError(
            f"outliers.channels: {outside[0]} is none of the channels 0 to {size - 1}"
        )
    gain = jnp.ones(size, x.dtype).at[jnp.asarray(channels, jnp.int32)].set(factor)
    return x * gain.reshape(-1, *(1,) * (-axis - 1))


def _check_factor(factor: float) -> None:
    if not factor > 0:
        raise ConfigError(f"outliers.factor={factor}: must be positive")
