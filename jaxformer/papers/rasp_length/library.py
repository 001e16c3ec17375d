"""The library of RASP-L, of nothing but its core (appendix: the standard library)."""

from __future__ import annotations

import operator

from jaxformer.papers.rasp_length.core import (
    Array,
    full,
    indices,
    integers,
    kqv,
    module_of,
    sel_width,
    select,
    seq_map,
)

NULL = -999  # no token: what is shifted in where nothing may match

equals, leq, lt, geq, gt = operator.eq, operator.le, operator.lt, operator.ge, operator.gt


def shift_right(x: Array, n: int, default: int = 0) -> Array:
    """Shift x by n places; `default` at the first n, which may be a token too."""
    return kqv(indices(x) + n, indices(x), x, equals, default)


def cumsum(b: Array) -> Array:
    """The number of true entries so far."""
    return sel_width(select(b, b, lambda k, q: k != 0))


def where(condition: Array, a: Array, b: Array) -> Array:
    """Choose a where the condition is true, else b."""
    return integers(module_of(condition, a, b).where(condition, a, b))


def mask(x: Array, m: Array, value: int = 0) -> Array:
    """Keep x where m is true, else `value`."""
    return where(m, x, full(x, value))


def maximum(x: Array) -> Array:
    """The largest entry so far."""
    return kqv(x, x, x, lambda k, q: True, reduction="max")


def minimum(x: Array) -> Array:
    """The least entry so far."""
    return -maximum(-x)


def argmax(x: Array) -> Array:
    """The last index so far of the largest entry so far."""
    return kqv(x, maximum(x), indices(x), equals, reduction="max")


def argmin(x: Array) -> Array:
    """The last index so far of the least entry so far."""
    return argmax(-x)


def num_prev(x: Array, q: Array) -> Array:
    """How often q_i stands in x so far."""
    return sel_width(select(x, q, equals))


def has_seen(x: Array, q: Array) -> Array:
    """1 where q_i stands in x so far, else 0."""
    return kqv(x, q, full(x, 1), equals)


def firsts(x: Array, q: Array, default: int = -1) -> Array:
    """The first index so far at which x is q_i."""
    return kqv(x, q, indices(x), equals, default, "min")


def lasts(x: Array, q: Array, default: int = -1) -> Array:
    """The last index so far at which x is q_i."""
    return kqv(x, q, indices(x), equals, default, "max")


def index_select(x: Array, index: Array, default: int = 0) -> Array:
    """x[index_i] where that is not later than i."""
    return kqv(indices(x), index, x, equals, default)


def first_true(b: Array, default: int = -1) -> Array:
    """The index of the first 1 so far, of zeros and ones."""
    seen = has_seen(b, full(b, 1))
    first = seq_map(seen, shift_right(seen, 1), lambda now, before: (now == 1) & (before == 0))
    return kqv(first, full(b, 1), indices(b), equals, default)


def mode(x: Array) -> Array:
    """The most frequent entry so far; of several the one that got there last."""
    return index_select(x, argmax(num_prev(x, x)))


def binary_mode(x: Array) -> Array:
    """1 where ones outnumber zeros so far, else 0."""
    return seq_map(num_prev(x, full(x, 1)), num_prev(x, full(x, 0)), gt)


def induct_kqv(
    k: Array, q: Array, v: Array, offset: int, default: int = 0, null: int = NULL
) -> Array:
    """The entry of v that lies `offset` places after the first q_i in k.

    The last `offset` entries of k are not looked at: what follows them is not there yet.
    """
    return index_select(v, firsts(shift_right(k, offset, null), q, null), default)


def induct(k: Array, q: Array, offset: int, default: int = 0, null: int = NULL) -> Array:
    """What stands `offset` places after the first q_i in k."""
    return induct_kqv(k, q, k, offset, default, null)


def induct_prev(k: Array, q: Array, offset: int, default: int = 0, null: int = NULL) -> Array:
    """`induct` for a negative offset."""
    return index_select(k, firsts(k, q, null) + offset, default)
