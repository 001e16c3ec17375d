"""A stream of documents about hidden topics, some of which hold runs of "x -> y ;".

Text is a Markov chain: a word follows, by a fixed table for each distance, from the last word, from
the one before or from the one before that, or it is a word that the document's topic likes. The
first `symbols` words are those that runs map from (x), the next `answers` those that they map to
(y); both are words of the text as well. A document with runs has a mapping of its own, for all of
its runs, so that a y is told by an earlier pair of the document alone. As the subject of a document
wanders, so may its mapping: with `drift` the latest pairs tell most. To learn the text a
model must look a few words back, which is what recalling pairs begins with: with text that follows
from the last word alone, and no such need, it took several times as long.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxformer.recipe import Batch, ConfigError


class _Walk(NamedTuple):
    """Where a document is: last words (order,), last x, y of each x, what of a pair comes next.

    The part is 0 in text, and 1 to 4 at x, the arrow, y and the end of a pair.
    """

    words: jax.Array
    x: jax.Array
    mapping: jax.Array
    part: jax.Array


@dataclasses.dataclass(frozen=True)
class Topics:
    """Rows for `DeviceData`: {"tokens": (length + 1,) int32}, all of which are scored.

    A share `runs` of the documents has runs: one begins after a word with the chance `enter`, and
    ends after a pair with the chance `leave`; half of these documents begin with one. After a pair
    some x, any of them, is mapped anew with the chance `drift`. Of the words of text a share
    `grammar` follows from one of the last `order`, each as often. `seed` draws the language: tables
    and topics.

    Raises:
        ConfigError: too few words, or a share outside of [0, 1].
    """

    length: int
    topics: int = 20
    words: int = 60
    symbols: int = 8
    answers: int = 4
    runs: float = 0.5
    enter: float = 0.1
    leave: float = 0.05
    drift: float = 0.0
    grammar: float = 0.9
    order: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("length", "topics", "symbols", "answers", "order"):
            if getattr(self, name) < 1:
                raise ConfigError(f"data.{name}={getattr(self, name)}: must be at least 1")
        if self.symbols + self.answers > self.words:
            raise ConfigError(
                f"data.words={self.words}: holds {self.symbols} symbols and {self.answers} "
                f"answers; give at least {self.symbols + self.answers}"
            )
        for name in ("runs", "enter", "leave", "drift", "grammar"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"data.{name}={getattr(self, name)}: must be from 0 to 1")

    @property
    def vocabulary(self) -> int:
        return self.words + 2

    @property
    def arrow(self) -> int:
        return self.words

    @property
    def end(self) -> int:
        return self.words + 1

    @functools.cached_property
    def language(self) -> tuple[np.ndarray, np.ndarray]:
        """The word that follows each, by distance (order, words); scores of topics' words.

        The second, (topics, words), is log p up to a constant.
        """
        draw = np.random.default_rng([self.seed, 20])
        follows = np.stack([draw.permutation(self.words) for _ in range(self.order)])
        liked = 1.5 * draw.normal(size=(self.topics, self.words))
        return follows, liked.astype(np.float32)

    def mapping(self, key: jax.Array) -> jax.Array:
        """The y of each x, (symbols,)."""
        return self.symbols + jax.random.randint(key, (self.symbols,), 0, self.answers)

    def __call__(self, step_key: jax.Array, row_keys: jax.Array) -> Batch:
        del step_key
        return {"tokens": jax.vmap(self._row)(row_keys)}

    def _row(self, key: jax.Array) -> jax.Array:
        keys = jax.random.split(key, 5)
        follows, liked = map(jnp.asarray, self.language)
        liked = liked[jax.random.randint(keys[0], (), 0, self.topics)]
        mapping = self.mapping(keys[1])
        first = jax.random.randint(keys[2], (self.order,), 0, self.words)
        below = jnp.cumsum(jax.nn.softmax(liked))
        drawn = jnp.searchsorted(below, jax.random.uniform(keys[3], (self.length + 1,)))
        drawn = jnp.minimum(drawn, self.words - 1)
        chance = jax.random.uniform(keys[4], (self.length + 2, 4))
        has_runs, begins = chance[0, 0] < self.runs, chance[0, 1] < 0.5

        def step(walk: _Walk, now: tuple[jax.Array, jax.Array]) -> tuple[_Walk, jax.Array]:
            drawn, (for_x, for_part, for_word, for_drift) = now
            back = (for_word / max(self.grammar, 1e-6) * self.order).astype(jnp.int32)
            follow = follows[jnp.minimum(back, self.order - 1), walk.words[back]]
            word = jnp.where(back < self.order, follow, drawn)
            x = jnp.minimum((for_x * self.symbols).astype(jnp.int32), self.symbols - 1)
            at_y = walk.mapping[walk.x]
            token = jnp.stack([word, x, self.arrow, at_y, self.end])[walk.part]
            in_text = walk.part == 0
            part = jnp.where(in_text, has_runs & (for_part < self.enter), walk.part % 4 + 1)
            leaves = (walk.part == 4) & (for_part < self.leave)
            drifts = (walk.part == 4) & (for_drift < self.drift)
            other_y = self.symbols + (for_word * self.answers).astype(jnp.int32)
            before = jnp.concatenate([word[None], walk.words[:-1]])
            return _Walk(
                jnp.where(in_text, before, walk.words),
                jnp.where(walk.part == 1, x, walk.x),
                jnp.where(drifts, walk.mapping.at[x].set(other_y), walk.mapping),
                jnp.where(leaves, 0, part),
            ), token

        start = _Walk(
            first, jnp.zeros((), jnp.int32), mapping, (has_runs & begins).astype(jnp.int32)
        )
        return jax.lax.scan(step, start, (drawn, chance[1:]))[1].astype(jnp.int32)
