"""What a call must be: every mistake is one line at trace time, by argument and value.

What an implementation cannot do is its own refusal (`choice`); here is what no call may be.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxformer.errors import ConfigError
from jaxformer.kernels.attention import operands as ops
from jaxformer.kernels.attention.masks import Mask, dense, positions_operand
from jaxformer.kernels.attention.mods import ProbMod
from jaxformer.kernels.attention.operands import Block, Idx, Operand, PerK, PerQ, Sizes

TYPES = ("bfloat16", "float16", "float32", "float64")


def check_arrays(q: Any, k: Any, v: Any) -> None:
    """Raise ConfigError where q, k and v do not belong together."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not _is_array(x):
            raise ConfigError(f"{name}: needs an array, got {type(x).__name__}")
    shapes = f"q {q.shape}, k {k.shape}, v {v.shape}"
    if not len(q.shape) == len(k.shape) == len(v.shape) == 4:
        raise ConfigError(
            f"attention: needs (batch, length, heads, head size) arrays, got {shapes}"
        )
    if not (q.shape[0] == k.shape[0] == v.shape[0] and k.shape[1:3] == v.shape[1:3]):
        raise ConfigError(f"attention: batch, key length or key heads differ: {shapes}")
    if q.shape[3] != k.shape[3]:
        raise ConfigError(f"attention: head sizes of q and k differ: {shapes}")
    if 0 in (*q.shape, *k.shape, *v.shape):
        raise ConfigError(f"attention: every axis needs at least one element, got {shapes}")
    if not q.dtype == k.dtype == v.dtype:
        raise ConfigError(f"attention: types differ: {q.dtype}, {k.dtype}, {v.dtype}")
    if q.dtype.name not in TYPES:
        raise ConfigError(f"attention: needs one of {', '.join(TYPES)}, got {q.dtype}")


def check_heads(sizes: Sizes, g: int, head_map: Any, sink: Any) -> tuple[int, ...] | None:
    """The head map as a tuple, None if it is uniform; raises ConfigError where heads do not fit."""
    h = sizes.h
    if sink is not None and not (
        _is_array(sink) and sink.shape == (h,) and jnp.issubdtype(sink.dtype, jnp.floating)
    ):
        found = f"{sink.dtype} {sink.shape}" if _is_array(sink) else type(sink).__name__
        raise ConfigError(f"sink: needs one floating number per query head, ({h},), got {found}")
    if head_map is None:
        if h % g:
            raise ConfigError(f"attention: {h} query heads over {g} key heads needs a head_map")
        return None
    heads = tuple(head_map)
    if (
        len(heads) != h
        or not all(isinstance(x, numbers.Integral) for x in heads)
        or not all(0 <= x < g for x in heads)
    ):
        raise ConfigError(f"head_map: needs {h} key heads in [0, {g}), got {heads}")
    heads = tuple(int(x) for x in heads)
    uniform = h % g == 0 and heads == tuple(i // (h // g) for i in range(h))
    return None if uniform else heads


def check_mask(mask: Any, sizes: Sizes) -> None:
    """Raise ConfigError where it is no mask, or an array of it does not lie over the scores."""
    if not isinstance(mask, Mask):
        raise ConfigError(
            f"mask: needs a Mask (for an array: DenseMask), got {type(mask).__name__}"
        )
    for axes, array in zip(mask.leaf_axes(), jax.tree.leaves(mask), strict=True):
        full = tuple(getattr(sizes, axis) for axis in axes)
        shape = jnp.shape(array)
        if len(shape) != len(full) or any(
            n not in (1, m) for n, m in zip(shape, full, strict=True)
        ):
            raise ConfigError(
                f"mask: {type(mask).__name__} has an array of shape {shape}, which does not "
                f"broadcast to ({', '.join(axes.upper())}) = {full}"
            )
        if not jnp.issubdtype(jnp.result_type(array), jnp.integer) and array.dtype != bool:
            raise ConfigError(
                f"mask: {type(mask).__name__} has an array of type {array.dtype}; masks are made "
                "of booleans or integers"
            )
    found = _fits("mask", lambda: dense(mask, *sizes))
    if found.dtype != bool:
        raise ConfigError(f"mask: {type(mask).__name__} gives {found.dtype}, it needs booleans")


def check_positions(q_pos: Any, k_pos: Any, sizes: Sizes) -> None:
    """Raise ConfigError where positions do not fit."""
    for name, pos, kind in (("q_pos", q_pos, PerQ), ("k_pos", k_pos, PerK)):
        _fits(name, lambda pos=pos, kind=kind: positions_operand(pos, kind, sizes))


def check_scale(scale: Any) -> float:
    """The scale as a float; raises ConfigError where it is not known while tracing."""
    if not isinstance(scale, numbers.Real):
        raise ConfigError(
            f"scale: needs a Python number, got {type(scale).__name__}; a learned one is a "
            "score_mod that multiplies with a Scalar or PerHead operand"
        )
    return float(scale)


def check_dropout(dropout: Any) -> tuple[float, Any]:
    """(rate, key) of dropout, (0, None) without; raises ConfigError on anything else."""
    if dropout is None:
        return 0.0, None
    if not isinstance(dropout, Sequence) or len(dropout) != 2:
        raise ConfigError(f"dropout: needs (rate, key), got {dropout!r}")
    rate, key = dropout
    if not isinstance(rate, numbers.Real) or not 0.0 <= rate < 1.0:
        raise ConfigError(f"dropout: rate must be in [0, 1), got {rate}")
    if rate and not _is_array(key):
        raise ConfigError(f"dropout: needs a key of jax.random.key, got {key!r}")
    return float(rate), key


def check_tiles(tiles: Any) -> tuple[int, int] | None:
    """Tiles as two ints; raises ConfigError where they are not."""
    if tiles is None:
        return None
    if (
        not isinstance(tiles, Sequence)
        or len(tiles) != 2
        or not all(isinstance(n, numbers.Integral) and n > 0 for n in tiles)
    ):
        raise ConfigError(f"tiles: needs two positive sizes (queries, keys), got {tiles}")
    return int(tiles[0]), int(tiles[1])


def check_mods(score_mod: Any, prob_mod: Any, aux: Mapping[str, Any], sizes: Sizes) -> None:
    """Raise ConfigError where an operand does not fit, or a mod does not map tiles to tiles."""
    for name, operand in aux.items():
        if not isinstance(operand, Operand):
            raise ConfigError(
                f"aux[{name!r}]: declare how tiles read it (Scalar, PerHead, PerQ, PerK, Tile, "
                f"Toeplitz), got {type(operand).__name__}"
            )
        _fits(f"aux[{name!r}]", lambda x=operand: x.prepare(sizes, sizes))
    if prob_mod is not None and not isinstance(prob_mod, ProbMod):
        raise ConfigError(
            f"prob_mod: needs ProbMod(fn, linear=True or False), got {type(prob_mod).__name__}"
        )
    if score_mod is not None and not callable(score_mod):
        raise ConfigError(
            f"score_mod: needs a function of (scores, idx, aux), got {type(score_mod).__name__}"
        )
    _check_mod("score_mod", score_mod, aux, sizes)
    _check_mod("prob_mod", None if prob_mod is None else prob_mod.fn, aux, sizes)


def check_parts(parts: Sequence[tuple[Any, Any]]) -> None:
    """Raise ConfigError where (output, LSE) pairs are not parts of one call."""
    shapes = [(o.shape, lse.shape) for o, lse in parts]
    if len(set(shapes)) != 1 or (*shapes[0][0][:1], *shapes[0][0][2:0:-1]) != shapes[0][1]:
        raise ConfigError(
            f"merge: needs parts of one shape, (B, L, H, Kv) and (B, H, L), got {shapes}"
        )


def _check_mod(
    name: str, mod: Callable[..., Any] | None, aux: Mapping[str, Operand], sizes: Sizes
) -> None:
    """Trace a mod on one tile, all scores."""
    if mod is None:
        return

    def trace(aux: dict[str, Operand]) -> Any:
        idx = ops.indices(sizes, Block.whole(sizes))
        parts = ops.read(ops.prepare(aux, sizes, sizes), Block.whole(sizes))
        return mod(jnp.zeros(sizes, jnp.float32), Idx(*idx), parts)

    try:
        found = jax.eval_shape(trace, dict(aux))
    except KeyError as error:
        raise ConfigError(
            f"{name}: reads the operand {error}, which aux does not have; it has {sorted(aux)}"
        ) from error
    shape, dtype = getattr(found, "shape", None), getattr(found, "dtype", None)
    if shape != tuple(sizes) or not jnp.issubdtype(dtype, jnp.floating):
        raise ConfigError(
            f"{name}: must return a floating-point tile of the shape it got, {tuple(sizes)}; "
            f"got {dtype} {shape}"
        )


def _fits(name: str, prepare: Callable[[], Any]) -> Any:
    """The shapes of what an argument is prepared to; its own complaint under its name."""
    try:
        return jax.eval_shape(prepare)
    except ValueError as error:
        raise ConfigError(f"{name}: {error}") from error


def _is_array(x: Any) -> bool:
    """A `jax.ShapeDtypeStruct` will do."""
    return hasattr(x, "shape") and hasattr(x, "dtype")
