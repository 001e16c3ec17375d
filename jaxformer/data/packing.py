"""Questions with answers, as rows of tokens: one to a row, or packed from a random place on.

A model whose positions are a table knows only those that it was trained at. Packing several
examples into a row that is then turned by a random shift trains all positions alike, whatever the
lengths of the examples (Zhou et al. 2023, arXiv 2310.16028, section 4).
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp

from jaxformer.recipe import Batch, ConfigError


class Example(NamedTuple):
    """A question and its answer: `tokens` (room,), of which the first `size` count."""

    tokens: jax.Array
    answer: jax.Array  # the index of its first answer token
    size: jax.Array


class Format(Protocol):
    """Examples of a task, at any length."""

    @property
    def vocabulary(self) -> int: ...

    def room(self, length: int) -> int:
        """The most tokens that an example of this length has.

        Raises:
            ConfigError: there are no examples of this length.
        """
        ...

    def __call__(self, key: jax.Array, length: jax.Array, longest: int) -> Example:
        """Draw one, of a traced `length` <= `longest`, in `room(longest)` tokens."""
        ...


def join(room: int, *parts: tuple[jax.Array, jax.typing.ArrayLike]) -> tuple[jax.Array, list]:
    """Of every (tokens, count) the first `count`, one after another, and where each part ends."""
    row, end, ends = jnp.zeros(room, jnp.int32), jnp.zeros((), jnp.int32), []
    for tokens, count in parts:
        at = jnp.arange(len(tokens))
        row = row.at[jnp.where(at < count, end + at, room)].set(tokens, mode="drop")
        end = end + count
        ends.append(end)
    return row, ends


class Ring(NamedTuple):
    """A packed row: all (row + 1,)."""

    tokens: jax.Array
    segment: jax.Array  # the number of a token's example; 0: filler
    scored: jax.Array  # whether it belongs to an answer whose question stands before it
    start: jax.Array  # whether an example begins here


@dataclasses.dataclass(frozen=True)
class Packed:
    """Rows for `DeviceData`: {"tokens": (row + 1,) int32, "weight": (row,) float32}.

    Examples with lengths uniform from `shortest` to `longest` stand one after another; answers are
    scored. With `shift` the row is turned by a random number of tokens, so that examples begin
    everywhere equally often; of the one that the turn breaks, what comes round to the front is not
    scored. With `reset` there is also "segment" (row + 1,), by which a model can be kept from
    looking into other examples.

    Raises:
        ConfigError: the longest example does not fit a row.
    """

    format: Format
    shortest: int
    longest: int
    row: int
    shift: bool = True
    reset: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.shortest <= self.longest:
            raise ConfigError(
                f"data.shortest={self.shortest}: must be from 1 to data.longest={self.longest}"
            )
        _check_room(self.format, self.longest, self.row)

    def __call__(self, step_key: jax.Array, row_keys: jax.Array) -> Batch:
        del step_key
        ring = jax.vmap(self.ring)(row_keys)
        batch = {"tokens": ring.tokens, "weight": ring.scored[:, 1:].astype(jnp.float32)}
        return {**batch, "segment": ring.segment} if self.reset else batch

    def ring(self, key: jax.Array) -> Ring:
        """One row, and what its tokens are."""
        size = self.row + 1
        most = max(size // self.format.room(self.shortest), 1)
        for_lengths, for_turn, *keys = jax.random.split(key, most + 2)
        lengths = jax.random.randint(for_lengths, (most,), self.shortest, self.longest + 1)
        draw = jax.vmap(self.format, (0, 0, None))
        found = draw(jnp.stack(keys), lengths, self.longest)

        starts = jnp.cumsum(found.size) - found.size
        at = jnp.arange(found.tokens.shape[1])
        whole = starts + found.size <= size
        inside = whole[:, None] & (at < found.size[:, None])
        place = jnp.where(inside, starts[:, None] + at, size)

        def lay(values: jax.Array) -> jax.Array:
            values = jnp.broadcast_to(values, place.shape).astype(jnp.int32)
            return jnp.zeros(size, jnp.int32).at[place].set(values, mode="drop")

        tokens, segment = lay(found.tokens), lay(1 + jnp.arange(most)[:, None])
        begins, answer = lay(starts[:, None]), lay(at >= found.answer[:, None])
        cut = jax.random.randint(for_turn, (), 0, size) if self.shift else 0
        index = (jnp.arange(size) + cut) % size
        tokens, segment, begins, answer = (x[index] for x in (tokens, segment, begins, answer))
        headless = (segment > 0) & (index >= cut) & (begins < cut)
        segment = jnp.where(headless, most + 1, segment)
        return Ring(
            tokens,
            segment,
            scored=(answer > 0) & ~headless,
            start=(segment > 0) & (index == begins),
        )


@dataclasses.dataclass(frozen=True)
class Alone:
    """Rows for `DeviceData`: one example of `length` at the front of each row, as in `Packed`.

    Raises:
        ConfigError: it does not fit a row.
    """

    format: Format
    length: int
    row: int

    def __post_init__(self) -> None:
        _check_room(self.format, self.length, self.row)

    def __call__(self, step_key: jax.Array, row_keys: jax.Array) -> Batch:
        del step_key
        length = jnp.asarray(self.length, jnp.int32)

        def one(key: jax.Array) -> Batch:
            tokens, answer, size = self.format(key, length, self.length)
            tokens = jnp.pad(tokens, (0, self.row + 1 - len(tokens)))
            at = jnp.arange(1, self.row + 1)
            return {"tokens": tokens, "weight": ((at >= answer) & (at < size)).astype(jnp.float32)}

        return jax.vmap(one)(row_keys)


def _check_room(format: Format, length: int, row: int) -> None:
    room = format.room(length)
    if room > row + 1:
        raise ConfigError(
            f"data.row={row}: an example of length {length} has up to {room} tokens; give at "
            f"least {room - 1}"
        )
