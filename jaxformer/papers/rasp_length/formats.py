"""The tasks: what an example of each length looks like, as tokens.

A vocabulary is the special tokens, then `symbols`, then hints. `values` gives the tokens the
integers that RASP-L programs know them by: symbol i is i, hint i is -100 - i, and START, SEP, END
and PLUS are -1, -3, -5 and -2. The length of an example is that of its question.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jaxformer.data.packing import Example, join
from jaxformer.recipe import ConfigError

START, SEP, END, PLUS = range(4)
SPECIAL = (-1, -3, -5, -2)  # their values
FIRST = len(SPECIAL)  # the token of symbol 0
HINT = -100  # the value of hint 0


@dataclasses.dataclass(frozen=True)
class Symbols:
    """Formats over a set of symbols, and perhaps of hints; abstract."""

    symbols: int
    hints: int = 0

    @property
    def vocabulary(self) -> int:
        return FIRST + self.symbols + self.hints

    @property
    def values(self) -> np.ndarray:
        """(vocabulary,) the integer of each token in RASP-L."""
        hints = HINT - np.arange(self.hints)
        return np.concatenate([SPECIAL, np.arange(self.symbols), hints]).astype(np.int32)

    def hint_block(self, key: jax.Array, count: jax.Array, longest: int) -> jax.Array:
        """(longest,) tokens of hints in their order, the first `count` a random block of the set.

        A question longer than those of training then has hints that were trained, all of them.
        """
        first = jax.random.randint(key, (), 0, self.hints - count + 1)
        return FIRST + self.symbols + first + jnp.arange(longest)

    def check(self, needed: int, available: int, field: str) -> None:
        if needed > available:
            raise ConfigError(f"{field}={available}: an example of this length needs {needed}")


def one(token: int) -> tuple[jax.Array, int]:
    return jnp.asarray([token]), 1


def uniform(key: jax.Array, symbols: int, count: int) -> jax.Array:
    return FIRST + jax.random.randint(key, (count,), 0, symbols)


def distinct(key: jax.Array, symbols: int, count: int) -> jax.Array:
    return FIRST + jax.random.permutation(key, symbols)[:count]


def interleave(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.stack([a, b], 1).reshape(-1)


class Count(Symbols):
    """START a b > a a+1 .. b END, of `length` numbers."""

    def room(self, length: int) -> int:
        self.check(length, self.symbols, "data.symbols")
        return length + 5

    def __call__(self, key: jax.Array, length: jax.Array, longest: int) -> Example:
        first = FIRST + jax.random.randint(key, (), 0, self.symbols - length + 1)
        question = jnp.stack([jnp.asarray(START), first, first + length - 1, jnp.asarray(SEP)])
        numbers = first + jnp.arange(longest)
        tokens, at = join(self.room(longest), (question, 4), (numbers, length), one(END))
        return Example(tokens, at[0], at[-1])


@dataclasses.dataclass(frozen=True)
class Copy(Symbols):
    """START x > x END; `unique`: no symbol occurs twice in x."""

    unique: bool = True

    def room(self, length: int) -> int:
        if self.unique:
            self.check(length, self.symbols, "data.symbols")
        return 2 * length + 3

    def answer(self, x: jax.Array, length: jax.Array) -> jax.Array:
        del length
        return x

    def __call__(self, key: jax.Array, length: jax.Array, longest: int) -> Example:
        x = (distinct if self.unique else uniform)(key, self.symbols, longest)
        parts = (one(START), (x, length), one(SEP), (self.answer(x, length), length), one(END))
        tokens, at = join(self.room(longest), *parts)
        return Example(tokens, at[2], at[-1])


@dataclasses.dataclass(frozen=True)
class Sort(Copy):
    """START x > (x in order) END, of distinct symbols."""

    def answer(self, x: jax.Array, length: jax.Array) -> jax.Array:
        return jnp.sort(jnp.where(jnp.arange(len(x)) < length, x, self.vocabulary))


@dataclasses.dataclass(frozen=True)
class Mode(Symbols):
    """START x > (the most frequent symbol of x) END; of x it is the only one.

    `scratchpad`: before it the numbers of all symbols of x, each a count and its symbol, in the
    order of "frequency" or of "appearance"; counts are symbols too, so there must be as many.
    """

    scratchpad: str = ""

    def __post_init__(self) -> None:
        allowed = ("", "frequency", "appearance")
        if self.scratchpad not in allowed:
            raise ConfigError(f"data.scratchpad={self.scratchpad!r}: must be one of {allowed}")

    @property
    def kinds(self) -> int:
        """How many symbols x is made of: with a scratchpad the rest are counts."""
        return min(self.symbols, 5) if self.scratchpad else self.symbols

    def room(self, length: int) -> int:
        if self.scratchpad:
            self.check(length + 1, self.symbols, "data.symbols")
        return length + 4 + (2 * self.kinds if self.scratchpad else 0)

    def __call__(self, key: jax.Array, length: jax.Array, longest: int) -> Example:
        x = jax.random.randint(key, (longest,), 0, self.kinds)
        inside = jnp.arange(longest) < length

        def counts(x: jax.Array) -> jax.Array:
            return (inside[:, None] & (x[:, None] == jnp.arange(self.kinds))).sum(0)

        # Where several are the most frequent, the first of them takes the place of another.
        found = counts(x)
        mode, tied = found.argmax(), (found == found.max()).sum() > 1
        loser = jnp.argmax(inside & (x != mode))
        x = jnp.where(tied, x.at[loser].set(mode), x)

        found, at = counts(x), jnp.arange(longest)
        appearance = jnp.where(inside[:, None] & (x[:, None] == jnp.arange(self.kinds)), 0, longest)
        appearance = (appearance + at[:, None]).min(0)
        first = -found if self.scratchpad == "frequency" else appearance
        order = jnp.lexsort((appearance, first, found == 0))
        pad = FIRST + interleave(found[order], order)
        pads = 2 * (found > 0).sum() if self.scratchpad else 0
        parts = (one(START), (FIRST + x, length), one(SEP), (pad, pads))
        answer = (FIRST + mode[None], 1)
        tokens, ends = join(self.room(longest), *parts, answer, one(END))
        return Example(tokens, ends[2], ends[-1])


class Parity(Symbols):
    """START x > (1 if x has an odd number of ones, else 0) END, of `length` bits."""

    def room(self, length: int) -> int:
        return length + 4

    def __call__(self, key: jax.Array, length: jax.Array, longest: int) -> Example:
        bits = jax.random.randint(key, (longest,), 0, 2)
        odd = jnp.where(jnp.arange(longest) < length, bits, 0).sum() % 2
        parts = (one(START), (FIRST + bits, length), one(SEP), (FIRST + odd[None], 1), one(END))
        tokens, at = join(self.room(longest), *parts)
        return Example(tokens, at[2], at[-1])


class ParityWithHints(Symbols):
    """START h0 x0 h1 x1 .. > + (hint of the first one) - (of the second) + .. END.

    The last sign is the answer. Symbols are 0, 1, "+" and "-".
    """

    def room(self, length: int) -> int:
        self.check(length, self.hints, "data.hints")
        return 4 * length + 4

    def __call__(self, key: jax.Array, length: jax.Array, longest: int) -> Example:
        for_bits, for_hints = jax.random.split(key)
        inside = jnp.arange(longest) < length
        bits = jnp.where(inside, jax.random.randint(for_bits, (longest,), 0, 2), 0)
        hints = self.hint_block(for_hints, length, longest)
        ones = hints[jnp.argsort(1 - bits)]  # a stable sort: those of the ones come first
        count = bits.sum()
        signs = FIRST + 2 + jnp.arange(longest) % 2
        parts = (
            one(START),
            (interleave(hints, FIRST + bits), 2 * length),
            one(SEP),
            (interleave(signs, ones), 2 * count),
            (FIRST + 2 + count[None] % 2, 1),
            one(END),
        )
        tokens, at = join(self.room(longest), *parts)
        return Example(tokens, at[2], at[-1])


@dataclasses.dataclass(frozen=True)
class And(Symbols):
    """START x > (1 if all bits of x are, else 0) END.

    A `share` of the examples has zeros, all of them between the fractions `zeros` of x.
    """

    zeros: tuple[float, float] = (0.0, 1.0)
    share: float = 0.5

    def room(self, length: int) -> int:
        return length + 4

    def __call__(self, key: jax.Array, length: jax.Array, longest: int) -> Example:
        for_which, for_count, for_order = jax.random.split(key, 3)
        low, high = (jnp.floor(part * length).astype(jnp.int32) for part in self.zeros)
        at = jnp.arange(longest)
        region = (at >= low) & (at < high)
        count = jax.random.randint(for_count, (), 1, jnp.maximum(high - low, 1) + 1)
        count = jnp.where(jax.random.bernoulli(for_which, self.share), count, 0)
        rank = jnp.where(region, jax.random.uniform(for_order, (longest,)), 2.0)
        bits = 1 - ((jnp.argsort(jnp.argsort(rank)) < count) & region).astype(jnp.int32)
        every = jnp.where(at < length, bits, 1).min()
        parts = (one(START), (FIRST + bits, length), one(SEP), (FIRST + every[None], 1), one(END))
        tokens, ends = join(self.room(longest), *parts)
        return Example(tokens, ends[2], ends[-1])


@dataclasses.dataclass(frozen=True)
class Addition(Symbols):
    """START a PLUS b SEP a+b END, of numbers with `length` digits and a zero before them.

    With `hints` there is a hint before every digit, the same for digits of one rank. Questions are
    written from the highest digit, the answer from the lowest if `reverse`. A run of carries
    begins at one digit, goes on over a number of nines that is uniform, and no other digits
    carry: uniform digits have almost never a long one.
    """

    reverse: bool = True

    def room(self, length: int) -> int:
        if self.hints:
            self.check(length + 1, self.hints, "data.hints")
        return (6 if self.hints else 3) * (length + 1) + 4

    def __call__(self, key: jax.Array, length: jax.Array, longest: int) -> Example:
        chain, start, quiet, loud, split, block = jax.random.split(key, 6)
        rank, digits = jnp.arange(longest + 1), length + 1
        run = jax.random.randint(chain, (), 1, length + 1)
        lowest = jax.random.randint(start, (), 0, length - run + 1)
        sums = jax.random.randint(quiet, rank.shape, 0, 9)
        sums = jnp.where(rank == lowest, jax.random.randint(loud, (), 10, 19), sums)
        sums = jnp.where((rank > lowest) & (rank < lowest + run), 9, sums)
        sums = jnp.where(rank >= length, 0, sums)
        least, most = jnp.maximum(sums - 9, 0), jnp.minimum(sums, 9)
        a = least + jax.random.randint(split, rank.shape, 0, most - least + 1)
        total = (sums + ((rank > lowest) & (rank <= lowest + run))) % 10
        hints = self.hint_block(block, digits, longest + 1) if self.hints else rank
        reading = jnp.where(rank < digits, digits - 1 - rank, rank)  # from the highest digit

        def written(number: jax.Array, down: bool) -> tuple[jax.Array, jax.Array]:
            order = reading if down else rank
            shown = FIRST + number[order]
            if not self.hints:
                return shown, digits
            named = hints if down else hints[reading]  # hints are in the order of questions
            return interleave(named, shown), 2 * digits

        parts = (
            one(START),
            written(a, True),
            one(PLUS),
            written(sums - a, True),
            one(SEP),
            written(total, not self.reverse),
            one(END),
        )
        tokens, at = join(self.room(longest), *parts)
        return Example(tokens, at[4], at[-1])
