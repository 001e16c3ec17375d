"""The core of RASP-L (section 3): what one causal transformer can do at any length.

A sequence is an integer array (..., s); a program maps it to one of the same shape, whose last
entry is the next token. Every definition serves NumPy and jax.numpy alike: the array that comes in
decides, so that programs run under `jax.jit` and `jax.vmap` too. Functions `f` and predicates
`pred(k, q)` are of whole arrays.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxformer.recipe import ConfigError

Array = Any  # NumPy's or JAX's
RANGE = (-128, 127)  # of tokens: few enough that any map of them can be learned

_inside = contextvars.ContextVar("inside a RASP-L program", default=False)


def module_of(*x: Any) -> Any:
    """`jax.numpy` where any of these is JAX's, else `numpy`."""
    return jnp if any(isinstance(each, jax.Array) for each in x) else np


def integers(x: Any) -> Array:
    """As integers, truncated towards zero."""
    xp = module_of(x)
    return xp.asarray(x).astype(int if xp is np else jnp.int32)


# Elementwise.


def full(x: Array, c: int) -> Array:
    """The constant c, as long as x."""
    return integers(module_of(x).full(x.shape, c))


def indices(x: Array) -> Array:
    """0, 1, .., s - 1."""
    xp = module_of(x)
    return integers(xp.broadcast_to(xp.arange(x.shape[-1]), x.shape))


def tok_map(x: Array, f: Callable[[Array], Array]) -> Array:
    """Apply f to each entry, to integers."""
    return integers(f(x))


def seq_map(x: Array, y: Array, f: Callable[[Array, Array], Array]) -> Array:
    """Apply f to the entries of two sequences, to integers."""
    return integers(f(x, y))


# Attention.


def select(k: Array, q: Array, pred: Callable[[Array, Array], Any], causal: bool = True) -> Array:
    """The boolean matrix (..., s, s) with A[i, j] = pred(k_j, q_i), causal: False for j > i.

    Raises:
        ConfigError: causal=False inside of a `program`.
    """
    if not causal and _inside.get():
        raise ConfigError("select.causal=False: RASP-L programs are causal; leave it True")
    xp, s = module_of(k, q), k.shape[-1]
    shape = (*np.broadcast_shapes(k.shape, q.shape), s)
    chosen = xp.broadcast_to(pred(k[..., None, :], q[..., :, None]), shape).astype(bool)
    return chosen & xp.tri(s, dtype=bool) if causal else chosen


def sel_width(A: Array) -> Array:
    """How many keys each query selects."""
    return integers(A.sum(-1))


def aggr(A: Array, v: Array, default: int = 0, reduction: str = "mean") -> Array:
    """The mean, max or min of the selected values; `default` where none is.

    The mean is over those selected, truncated towards zero.
    """
    if reduction == "min":
        return -aggr(A, -v, -default, "max")
    xp, width, v = module_of(A, v), sel_width(A), integers(v)
    if reduction == "mean":
        total = xp.where(A, v[..., None, :], 0).sum(-1)
        found = xp.sign(total) * (abs(total) // xp.maximum(width, 1))
    elif reduction == "max":
        found = xp.where(A, v[..., None, :], xp.iinfo(v.dtype).min).max(-1)
    else:
        raise ConfigError(f"aggr.reduction={reduction!r}: must be one of mean, max, min")
    return integers(xp.where(width > 0, found, default))


def kqv(
    k: Array,
    q: Array,
    v: Array,
    pred: Callable[[Array, Array], Any],
    default: int = 0,
    reduction: str = "mean",
) -> Array:
    """One attention head: `aggr` of what `select` selects."""
    return aggr(select(k, q, pred), v, default, reduction)


# Programs.


@contextlib.contextmanager
def _restricted() -> Iterator[None]:
    token = _inside.set(True)
    try:
        yield
    finally:
        _inside.reset(token)


def program(function: Callable[..., Array]) -> Callable[..., Array]:
    """Mark a function of tokens as a RASP-L program: its input is checked, all of it is causal.

    Tokens are from `RANGE`, which is checked where their values are known. That indices are only
    compared and moved by constants, the language's other rule, is left to the author.
    """

    @functools.wraps(function)
    def checked(x: Array, *args: Any, **kwargs: Any) -> Array:
        x = integers(x)
        if not x.ndim or not x.size:
            raise ConfigError(f"{function.__name__}: an empty sequence; give at least one token")
        low, high = RANGE
        known = not isinstance(x, jax.core.Tracer)
        if known and not bool(((x >= low) & (x <= high)).all()):
            raise ConfigError(
                f"{function.__name__}: tokens from {int(x.min())} to {int(x.max())}; RASP-L has "
                f"those from {low} to {high}"
            )
        with _restricted():
            return function(x, *args, **kwargs)

    return checked


def complete(
    program: Callable[[np.ndarray], np.ndarray], prompt: Any, end: int, most: int = 100
) -> np.ndarray:
    """The prompt and what a program writes after it, token by token: up to `end`, or `most`."""
    x = np.asarray(prompt)
    for _ in range(most):
        x = np.append(x, program(x)[-1])
        if x[-1] == end:
            break
    return x
