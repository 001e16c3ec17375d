"""Which positions a step trains on: random shifts, pivots with candidates, blocks to compare.

Everything is drawn on the device from (seed, step), so that a run that knows its step draws what
an unbroken one would. Positions are numbered 0 .. count - 1; with two axes row by row.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxformer.errors import ConfigError
from jaxformer.papers.seqpe.encoder import BASE, Strings

HARD_RATE, HARD_SHARE = 0.4, 0.25  # candidates with similar digits: how often, of how many
TRIES = 4  # drawn for each of them, because some are refused
EDITS = 3  # of digits, at most


class Contrast(NamedTuple):
    """Pivots (b, axes), their candidates (b, c, axes), and which of these is the nearest (b,)."""

    pivot: jax.Array
    candidates: jax.Array
    label: jax.Array


class Comparison(NamedTuple):
    """Indices (b, t) into the block of the main task, and positions (b, t, axes) far away."""

    index: jax.Array
    far: jax.Array


class Draw(NamedTuple):
    """What a step trains on."""

    shifted: jax.Array  # scalar bool
    start: jax.Array  # (starts, axes): where the blocks of a shifted step begin
    contrast: Contrast
    comparison: Comparison


@dataclasses.dataclass(frozen=True)
class Sampler:
    """The draws of section 3.3 for blocks of the main task of shape `block`, (L,) or (h, w).

    Raises:
        ConfigError: there are too few positions for what is drawn of them.
    """

    strings: Strings
    block: tuple[int, ...]
    starts: int = 16  # b
    shift_rate: float = 0.1  # r
    pool: int = 320
    candidates: int = 32  # c
    near: int = 256  # length of the window that near candidates come from
    compared: int = 32  # t

    def __post_init__(self) -> None:
        side, length = self.strings.side, math.prod(self.block)
        if len(self.block) != self.strings.axes:
            raise ConfigError(
                f"Sampler.block={self.block}: must have model.axes={self.strings.axes} sides"
            )
        if max(self.block) >= side or not len(self._far):
            raise ConfigError(
                f"model.positions={self.strings.limit}: leaves no room beyond blocks of "
                f"{self.block}; give more"
            )
        if not 1 <= self.candidates < min(self.count, 1 + self._window ** len(self.block)):
            raise ConfigError(
                f"positions.candidates={self.candidates}: allowed for {self.count} positions are "
                f"1 to {self.count - 1}"
            )
        if not 1 <= self.compared <= length:
            raise ConfigError(
                f"positions.compared={self.compared}: allowed for blocks of {length} are 1 to "
                f"{length}"
            )
        if not 1 <= self.starts <= self.count:
            raise ConfigError(f"positions.starts={self.starts}: allowed are 1 to {self.count}")

    @property
    def count(self) -> int:
        """All positions."""
        return self.strings.side**self.strings.axes

    @property
    def inside(self) -> np.ndarray:
        """The block of the main task where it is not shifted, (L, axes)."""
        axes = [np.arange(n, dtype=np.int32) for n in self.block]
        return np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, len(self.block))

    @functools.cached_property
    def _far(self) -> np.ndarray:
        """Starts (n, axes) of blocks to compare: from L / 4 on, or with some side all outside."""
        last = [self.strings.side - n for n in self.block]
        grid = np.meshgrid(*(np.arange(n) for n in last), indexing="ij")
        starts = np.stack(grid, axis=-1).reshape(-1, len(self.block)).astype(np.int32)
        least = np.asarray(self.block) if len(self.block) > 1 else np.asarray(self.block) // 4
        return starts[(starts >= least).any(-1)]

    @property
    def _window(self) -> int:
        """The side of the window that near candidates come from."""
        side, axes = self.strings.side, self.strings.axes
        return min(side, math.ceil(max(self.near, 5 * self.candidates) ** (1 / axes)))

    def draw(self, seed: jax.Array, step: jax.Array) -> Draw:
        """The draws of a step."""
        # Off the keys by step that data of the same seed has.
        base = jax.random.fold_in(jax.random.key(seed), 2**31)
        keys = jax.random.split(jax.random.fold_in(base, step), 4)
        turn = step * self.starts + jnp.arange(self.starts)
        far = jnp.asarray(self._far)
        start = far[below(len(far), bits(keys[0], self.starts))]
        drawn = bits(keys[1], self.starts, 2, self.compared)
        index = jax.vmap(functools.partial(distinct, math.prod(self.block)))(drawn)
        comparison = Comparison(index, start[:, None] + jnp.asarray(self.inside)[index])
        pivot = self._pivots(base, turn)
        candidates, label = self._candidates(keys[2], pivot)
        return Draw(
            jax.random.bernoulli(keys[3], self.shift_rate),
            self._pool(base)[turn % self.pool],
            Contrast(self._at(pivot), self._at(candidates), label),
            comparison,
        )

    def _pool(self, base: jax.Array) -> jax.Array:
        """Starts of shifted blocks, drawn once for a run."""
        key = jax.random.fold_in(base, 2**31)  # no step is so late
        most = jnp.asarray([self.strings.side - n + 1 for n in self.block])
        return jax.random.randint(key, (self.pool, len(self.block)), 0, most)

    def _pivots(self, base: jax.Array, turn: jax.Array) -> jax.Array:
        """Those of a pass over all positions in random order; every pass has its own."""
        first, last = turn[0] // self.count, turn[-1] // self.count

        def order(number: jax.Array) -> jax.Array:
            key = jax.random.fold_in(jax.random.fold_in(base, 2**31 + 1), number)
            return jnp.argsort(bits(key, self.count))

        place = turn % self.count
        return jnp.where(turn // self.count == first, order(first)[place], order(last)[place])

    def _at(self, number: jax.Array) -> jax.Array:
        """(..., axes) of numbered positions."""
        side, axes = self.strings.side, self.strings.axes
        powers = side ** np.arange(axes)[::-1]
        return number[..., None] // powers % side

    def _distance(self, a: jax.Array, b: jax.Array) -> jax.Array:
        """Squared, of numbered positions."""
        return jnp.square(self._at(a) - self._at(b)).sum(-1)

    def _candidates(self, key: jax.Array, pivot: jax.Array) -> tuple[jax.Array, jax.Array]:
        """For each pivot (b,) c different positions other than itself, and which is the nearest.

        First come those with similar digits or those of one window, then any.
        """
        b, c, axes = self.starts, self.candidates, self.strings.axes
        hard = int(HARD_SHARE * c)
        keys = jax.random.split(key, 5)
        return jax.vmap(self._of_pivot)(
            pivot,
            bits(keys[0], b, 2, c + 1),
            bits(keys[1], b, TRIES * hard, 2 + 4 * EDITS),
            bits(keys[2], b, axes),
            bits(keys[3], b, 2, c),
            jax.random.bernoulli(keys[4], HARD_RATE, (b,)),
        )

    def _of_pivot(
        self,
        pivot: jax.Array,
        for_plain: jax.Array,
        for_edits: jax.Array,
        for_window: jax.Array,
        for_close: jax.Array,
        is_hard: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:
        c, side, axes = self.candidates, self.strings.side, self.strings.axes
        plain = distinct(self.count, for_plain)
        to_plain = self._distance(plain, pivot)
        nearest = jnp.where(plain == pivot, jnp.iinfo(jnp.int32).max, to_plain).min()

        edited, fits = jax.vmap(functools.partial(self._edited, pivot))(for_edits)
        fits &= self._distance(edited, pivot) > nearest
        fits &= jnp.cumsum(fits) <= len(fits) // TRIES

        window, powers = self._window, np.arange(axes)[::-1]
        corner = below(side - window + 1, for_window)
        inside = distinct(window**axes, for_close)[:, None] // window**powers % window
        close = ((corner + inside) * side**powers).sum(-1)

        found = jnp.concatenate([edited, close, plain])
        kept = jnp.concatenate([fits & is_hard, jnp.full(c, ~is_hard), jnp.ones(c + 1, bool)])
        before = jnp.tril(jnp.ones((len(found), len(found)), bool), -1)
        again = ((found[:, None] == found) & before & kept).any(-1)
        kept &= ~again & (found != pivot)
        chosen = found[jnp.argsort(~kept, stable=True)[:c]]
        return chosen, self._distance(chosen, pivot).argmin()

    def _edited(self, pivot: jax.Array, drawn: jax.Array) -> tuple[jax.Array, jax.Array]:
        """A position that is 1 to 3 edits of digits away, along one axis; whether it is one."""
        side, axes = self.strings.side, self.strings.axes
        weight = jnp.asarray(side ** np.arange(axes))[below(axes, drawn[0])]
        here = pivot // weight % side
        times = 1 + below(EDITS, drawn[1])
        x, good = here, jnp.asarray(True)
        for i, numbers in enumerate(drawn[2:].reshape(EDITS, 4)):
            changed, fine = edit(x, numbers)
            x = jnp.where(i < times, changed, x)
            good &= fine | (i >= times)
        good &= x < side
        return pivot + (jnp.where(good, x, here) - here) * weight, good


def bits(key: jax.Array, *shape: int) -> jax.Array:
    """Random numbers of 32 bits: a few draws for all, because each is long to compile."""
    return jax.random.bits(key, shape, jnp.uint32)


def below(n: int | jax.Array, drawn: jax.Array) -> jax.Array:
    """Numbers 0 .. n - 1 of 32 random bits each, even to n / 2^32."""
    return (drawn % jnp.asarray(n, jnp.uint32)).astype(jnp.int32)


def distinct(count: int, drawn: jax.Array) -> jax.Array:
    """N different numbers below `count` in random order, (n,), of random bits (2, n).

    Floyd's algorithm: it needs no order of all.
    """
    n = drawn.shape[1]

    def take(i: jax.Array, taken: jax.Array) -> jax.Array:
        top = count - n + i
        x = below(top + 1, drawn[0, i])
        return taken.at[i].set(jnp.where((taken == x).any(), top, x))

    taken = jax.lax.fori_loop(0, n, take, jnp.full(n, -1, jnp.int32))
    return taken[jnp.argsort(drawn[1])]


def edit(x: jax.Array, drawn: jax.Array) -> tuple[jax.Array, jax.Array]:
    """X with a digit inserted, changed or deleted, or two swapped, as random bits (4,) say.

    And whether no 0 is in front. Up to three edits of a number of 6 digits fit int32.
    """
    kind, digit = below(4, drawn[0]), below(BASE, drawn[3])
    powers = jnp.asarray(BASE ** np.arange(10), jnp.int32)
    size = jnp.maximum((x >= powers).sum(), 1)

    def at(place: jax.Array) -> tuple[jax.Array, jax.Array]:
        return powers[place], x // powers[place] % BASE

    gap = powers[below(size + 1, drawn[1])]
    inserted = (x // gap * BASE + digit) * gap + x % gap
    (one, a), (two, b) = at(below(size, drawn[1])), at(below(size, drawn[2]))
    results = jnp.stack(
        [
            inserted,
            x + (digit - a) * one,
            x // one // BASE * one + x % one,
            x + (b - a) * one + (a - b) * two,
        ]
    )
    wanted = size + jnp.asarray([1, 0, -1, 0])[kind]
    y = results[kind]
    return y, jnp.maximum((y >= powers).sum(), 1) == wanted
