"""The paper's programs: each gives, at every place, the token that comes next.

Tokens are those of `formats`: symbols from 0, hints from -100 downwards, and the specials below.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from jaxformer.papers.rasp_length.core import Array, full, indices, kqv, program, seq_map, tok_map
from jaxformer.papers.rasp_length.library import (
    argmax,
    cumsum,
    equals,
    firsts,
    gt,
    has_seen,
    index_select,
    induct,
    induct_prev,
    lasts,
    lt,
    mask,
    num_prev,
    shift_right,
    where,
)

START, PLUS, SEP, END = -1, -2, -3, -5
NONE = -88  # in place of what is masked
EVEN, ODD = 2, 3  # the signs of the parity scratchpad, "+" and "-"


@program
def count(x: Array, end: int = END, missing: int = -1) -> Array:
    """START a b > -> a a+1 .. b END, or without ">", as the official program has it.

    `missing` is the place of START before there is one.
    """
    start = lasts(x, full(x, START), missing)
    a, b = index_select(x, start + 1), index_select(x, start + 2)
    first = seq_map(indices(x), start + 2, equals) | (x == SEP)
    last = seq_map(x, b, equals)
    return where(first, a, where(last, full(x, end), x + 1))


@program
def unique_copy(x: Array) -> Array:
    """START x > -> x END, of different symbols: what came after the same token before."""
    y = where(x == SEP, full(x, START), x)
    following = induct(y, y, 1)
    return where(following == START, full(x, END), following)


@program
def sort(x: Array) -> Array:
    """START x > -> x in order, END: the least symbol above the last one."""
    k = mask(x, x >= 0, NONE)
    return kqv(k, x, x, gt, END, "min")


@program
def most_frequent(x: Array) -> Array:
    """START x > -> its most frequent symbol, END."""
    often = mask(num_prev(x, x), x >= 0)
    return where(x == SEP, index_select(x, argmax(often)), full(x, END))


@program
def logical_and(x: Array) -> Array:
    """START x > -> 1 unless a 0 was seen, END."""
    return where(x == SEP, 1 - has_seen(x, full(x, 0)), full(x, END))


@program
def parity_with_hints(x: Array) -> Array:
    """START h0 x0 h1 x1 .. > -> a sign, the hint of the next one, the other sign, .., END.

    Parity itself has no short program: it would have to count.
    """
    of_ones = where(x == 1, shift_right(x, 1), full(x, 2 * NONE))  # below all hints
    passed = shift_right(x, 1)  # at a sign: the hint of the last one, or the separator
    following = kqv(of_ones, passed, of_ones, lt, 2 * NONE, "max")
    after_sign = where(following == 2 * NONE, full(x, END), following)
    after_hint = EVEN + ODD - shift_right(x, 1)
    after = where((x == EVEN) | (x == ODD), after_sign, after_hint)
    return where(x == SEP, full(x, EVEN), after)


@program
def addition(x: Array, reverse: bool = True, top: int = -100) -> Array:
    """START a PLUS b SEP -> a+b END, all digits behind hints that fall from `top`.

    Numbers begin with a zero; questions are written from the highest digit, the answer from the
    lowest if `reverse`.
    """
    prompt = mask(x, 1 - has_seen(x, full(x, SEP)))
    second = has_seen(x, full(x, PLUS)) & (1 - has_seen(x, full(x, SEP)))
    partner = induct(prompt, shift_right(prompt, 1), 1)  # of a digit behind the same hint
    sums = mask(where(x >= 0, x + partner, x), second, NONE)  # at the digits of b
    written = shift_right(x, 1)  # at a hint: the digit before it, and the sum it is of
    written_sum = induct(sums, shift_right(x, 2), 1)
    next_sum = induct(sums, x, 1)
    end_of_prompt = induct_prev(x, full(x, SEP), -2)  # the lowest hint
    if reverse:
        carry = (written_sum > 9) | ((written_sum == 9) & (written == 0))
        first_hint, next_hint = end_of_prompt, written + 1
        done = next_hint > top
    else:
        carry = _carry_from_the_right(x, sums, next_sum, written_sum % 10 != written)
        first_hint, next_hint = full(x, top), written - 1
        done = next_hint < end_of_prompt
    digit = tok_map(next_sum + carry, lambda value: value % 10)
    hint = where(done, full(x, END), next_hint)
    return where(x == SEP, first_hint, where(x > -100, hint, digit))


def _carry_from_the_right(x: Array, sums: Array, next_sum: Array, written_got: Array) -> Array:
    """Whether the digit to be written receives a carry from digits that are still to come.

    A 9 receives one if the digit before it did. Else one begins to its right: sums other than 9
    are counted, so that a run of nines shares the number of the digit to its left, at which the
    carry of the digit to its right ends.
    """
    digits = mask(sums, x >= 0, NONE)
    number = cumsum((digits != 9) & (digits != NONE))
    giver = mask(number, digits > 9, NONE)
    ends = firsts(number, giver - 1, NONE)
    place = kqv(sums, x, indices(x), equals) + 1
    received = kqv(ends, place, full(x, 1), equals)
    return ((next_sum == 9) & written_got) | received


PROGRAMS: Mapping[str, Callable[..., Array]] = {
    "count": count,
    "unique_copy": unique_copy,
    "sort": sort,
    "mode": most_frequent,
    "and": logical_and,
    "parity_with_hints": parity_with_hints,
    "addition": addition,
}
