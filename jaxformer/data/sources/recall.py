"""Associative recall: read key-value pairs, then answer for keys seen before.

`Recall` is a causal language of tokens with many questions, `PairRecall` one question about a set.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jaxformer.recipe import Batch, ConfigError


@dataclasses.dataclass(frozen=True)
class Recall:
    """Rows for `DeviceData`: `pairs` different keys, each followed by its value, then queries.

    Token 0 is filler, keys are 1 .. vocabulary / 2 - 1, values the upper half. After the pairs
    every key is asked for once, at a random place of the rest; only the token after a query, its
    value, is scored ("weight" (B, length)). In the manner of Arora et al. 2023, arXiv 2312.04927.

    Raises:
        ConfigError: the pairs and their queries do not fit the length, or the keys run out.
    """

    length: int
    pairs: int
    vocabulary: int

    def __post_init__(self) -> None:
        if 4 * self.pairs > self.length:
            raise ConfigError(
                f"data.pairs: {self.pairs} pairs and as many answered queries need a data.length "
                f"of {4 * self.pairs}, got {self.length}"
            )
        if self.pairs >= self.vocabulary // 2:
            raise ConfigError(
                f"data.pairs: {self.pairs} different keys need a model.vocabulary of at least "
                f"{2 * self.pairs + 2}, got {self.vocabulary}"
            )

    def __call__(self, step_key: jax.Array, row_keys: jax.Array) -> Batch:
        del step_key
        return jax.vmap(self._row)(row_keys)

    def _row(self, key: jax.Array) -> Batch:
        half = self.vocabulary // 2
        for_keys, for_values, for_places, for_order = jax.random.split(key, 4)
        keys = 1 + jax.random.choice(for_keys, half - 1, (self.pairs,), replace=False)
        values = half + jax.random.randint(for_values, (self.pairs,), 0, half)
        pairs = jnp.stack([keys, values], 1).reshape(-1)

        slots = (self.length - 2 * self.pairs) // 2  # a query and its answer take one
        at = jax.random.choice(for_places, slots, (self.pairs,), replace=False)
        order = jax.random.permutation(for_order, self.pairs)
        rest = (
            jnp.zeros((slots, 2), jnp.int32).at[at].set(jnp.stack([keys[order], values[order]], 1))
        )
        tokens = jnp.concatenate([pairs, rest.reshape(-1)])
        tokens = jnp.pad(tokens, (0, self.length + 1 - tokens.size)).astype(jnp.int32)
        asked = jnp.zeros((slots, 2)).at[at, 0].set(1.0).reshape(-1)
        weight = jnp.concatenate([jnp.zeros(2 * self.pairs), asked])
        return {"tokens": tokens, "weight": jnp.pad(weight, (0, self.length - weight.size))}


@dataclasses.dataclass(frozen=True)
class PairRecall:
    """Rows for `DeviceData`: positions that each hold a key and its value, and one question.

    {"inputs": (length, keys + values + 1) float32, "label": int32}. The first `pairs` positions are
    the one-hot of a key, all different, beside that of a random value; the last `asked` positions
    hold the key in question, and 1 in the last component where its value is not known; those
    between hold nothing. The label is the value that belongs to the key.

    Raises:
        ConfigError: pairs and question do not fit the length, or the keys run out.
    """

    length: int
    pairs: int
    keys: int
    values: int
    asked: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.asked <= self.length - self.pairs:
            raise ConfigError(
                f"data.asked: {self.asked} questions beside {self.pairs} pairs in a data.length of "
                f"{self.length}; allowed: 1 to {self.length - self.pairs}"
            )
        if not 1 <= self.pairs <= self.keys:
            raise ConfigError(
                f"data.pairs: {self.pairs} with keys of their own; allowed: 1 to "
                f"data.key_count={self.keys}"
            )

    def __call__(self, step_key: jax.Array, row_keys: jax.Array) -> Batch:
        del step_key
        return jax.vmap(self._row)(row_keys)

    def _row(self, key: jax.Array) -> Batch:
        for_keys, for_values, for_question = jax.random.split(key, 3)
        keys = jax.random.permutation(for_keys, self.keys)[: self.pairs]
        values = jax.random.randint(for_values, (self.pairs,), 0, self.values)
        one = jax.random.randint(for_question, (), 0, self.pairs)
        one_hot_keys = jax.nn.one_hot(keys, self.keys)
        known = jnp.concatenate([one_hot_keys, jax.nn.one_hot(values, self.values + 1)], 1)
        unknown = jax.nn.one_hot(self.values, self.values + 1)
        question = jnp.concatenate([one_hot_keys[one], unknown])
        inputs = jnp.zeros((self.length, self.keys + self.values + 1)).at[: self.pairs].set(known)
        inputs = inputs.at[self.length - self.asked :].set(question)
        return {"inputs": inputs, "label": values[one]}
