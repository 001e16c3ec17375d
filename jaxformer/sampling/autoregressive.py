"""Sampling from a task that `Generates`, one token at a time on a decode state."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxformer.errors import ConfigError
from jaxformer.recipe import Extra, Generates, Params

Prompt = TypeVar("Prompt", str, list[int])


@dataclasses.dataclass(frozen=True)
class Sampler:
    """How a token is drawn from logits.

    Logits are divided by `temperature` (0 takes the largest), then restricted to the `top_k`
    largest, then to the fewest that hold `top_p` of what is left (Holtzman et al. 2019, arXiv
    1904.09751). Among equal logits the lower token goes first.

    Raises:
        ConfigError: a value out of range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < float("inf"):
            raise ConfigError(f"temperature={self.temperature}: must be finite and at least 0")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top_k={self.top_k}: must be at least 1, or None for all tokens")
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            raise ConfigError(f"top_p={self.top_p}: must be in (0, 1], or None for all tokens")

    def restrict(self, logits_BxV: jax.Array) -> jax.Array:
        """Logits whose softmax is the distribution that is drawn from; -inf where it is 0."""
        logits = logits_BxV.astype(jnp.float32)
        if self.temperature == 0.0:
            best = logits.argmax(-1, keepdims=True)
            return jnp.where(jnp.arange(logits.shape[-1]) == best, 0.0, -jnp.inf)
        logits = logits / self.temperature
        if self.top_k is None and self.top_p is None:
            return logits
        order = jnp.argsort(-logits, axis=-1, stable=True)
        ranked = jnp.take_along_axis(logits, order, axis=-1)
        if self.top_k is not None:
            ranked = jnp.where(jnp.arange(ranked.shape[-1]) < self.top_k, ranked, -jnp.inf)
        if self.top_p is not None:
            p = jax.nn.softmax(ranked, axis=-1)
            ranked = jnp.where(jnp.cumsum(p, axis=-1) - p < self.top_p, ranked, -jnp.inf)
        return jnp.put_along_axis(logits, order, ranked, axis=-1, inplace=False)

    def draw(self, keys_B: jax.Array, logits_BxV: jax.Array) -> jax.Array:
        """One token (B,) per row, each from its own key."""
        if self.temperature == 0.0:  # the largest, without V random numbers a row
            return logits_BxV.astype(jnp.float32).argmax(-1).astype(jnp.int32)
        return jax.vmap(jax.random.categorical)(keys_B, self.restrict(logits_BxV)).astype(jnp.int32)


def generate(
    task: Generates,
    params: Params,
    extra: Extra,
    prompts: Sequence[Prompt],
    *,
    length: int,
    key: jax.Array,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop: Collection[int] = (),
    on_token: Callable[[int, int], None] | None = None,
) -> list[Prompt]:
    """What follows each prompt: `length` tokens, or those up to one in `stop`, inclusive.

    Prompts are texts or lists of tokens, of any lengths; what follows is of the same kind, without
    the prompt, and does not depend on the prompts beside it: row i draws its n-th token with
    fold_in(fold_in(key, i), n). `on_token(row, token)` is called with each new token as it
    appears; without it the loop runs on the device.

    Raises:
        ConfigError: an argument out of range, or an empty prompt.
    """
    if not isinstance(task, Generates):
        raise ConfigError(
            f"task: {type(task).__name__} does not generate; it needs the methods of "
            "jaxformer.recipe.Generates: encode, decode, start, advance"
        )
    if length < 1:
        raise ConfigError(f"length={length}: must be at least 1 new token")
    rule = _Rule(task, Sampler(temperature, top_k, top_p), length)
    tokens, lengths = _pad([task.encode(p) if isinstance(p, str) else p for p in prompts], length)
    stop = np.asarray(sorted(stop), np.int32)
    progress = _read_prompts(rule, int(lengths.min()), params, extra, tokens, lengths, stop, key)
    if on_token is None:
        progress = _finish(rule, params, extra, progress)
    else:
        progress = _stream(rule, params, extra, progress, on_token)
    rows, ends = jax.device_get((progress.tokens, progress.ends))
    found = [row[n:end].tolist() for row, n, end in zip(rows, lengths, ends, strict=True)]
    return [
        task.decode(new) if isinstance(prompt, str) else new
        for prompt, new in zip(prompts, found, strict=True)
    ]


@dataclasses.dataclass(frozen=True)
class _Rule:
    """The static part of a generation."""

    task: Generates
    sampler: Sampler
    length: int


class _Progress(NamedTuple):
    tokens: jax.Array  # (B, T) prompts, then what followed them
    lengths: jax.Array  # (B,) of the prompts
    stop: jax.Array  # the tokens that end a row
    ends: jax.Array  # (B,) where the tokens known so far end
    column: jax.Array  # the next column to fill
    added: jax.Array  # (B,) whether the last filled column is a new token of that row
    done: jax.Array  # (B,)
    keys: jax.Array  # (B,)
    state: Any


def _pad(prompts: Sequence[Sequence[int]], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Prompts as one array (B, T) with room for `length` more tokens, and their lengths (B,)."""
    if not prompts:
        raise ConfigError("prompts: none given; give at least one")
    lengths = np.asarray([len(prompt) for prompt in prompts], np.int32)
    if not lengths.all():
        raise ConfigError(
            f"prompts: number {lengths.argmin()} is empty; give a token to start from"
        )
    tokens = np.zeros((len(prompts), lengths.max() + length), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    return tokens, lengths


@functools.partial(jax.jit, static_argnums=(0, 1))
def _read_prompts(
    rule: _Rule,
    shortest: int,
    params: Params,
    extra: Extra,
    tokens: jax.Array,
    lengths: jax.Array,
    stop: jax.Array,
    key: jax.Array,
) -> _Progress:
    """Read what all prompts have, side by side, and fill the next column.

    Longer prompts are read on in the common loop, where their own tokens stand in for drawn
    ones. So no row is ever padded, and any decode state will do, recurrent or cached.
    """
    batch, total = tokens.shape
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(batch))
    # The last token is drawn and not read.
    state = rule.task.start(params, extra, batch_size=batch, length=total - 1)
    logits, state = rule.task.advance(params, extra, state, tokens[:, :shortest])
    none = jnp.zeros(batch, bool)
    column = jnp.asarray(shortest, jnp.int32)
    progress = _Progress(tokens, lengths, stop, lengths, column, none, none, keys, state)
    return _fill(rule, progress, logits)


def _fill(rule: _Rule, at: _Progress, logits_BxV: jax.Array) -> _Progress:
    """Write the next column: the prompt's token where there is one, else a drawn one."""
    given = jax.lax.dynamic_index_in_dim(at.tokens, at.column, axis=1, keepdims=False)
    added = (at.column >= at.lengths) & ~at.done
    count = jnp.maximum(at.column - at.lengths, 0)
    drawn = rule.sampler.draw(jax.vmap(jax.random.fold_in)(at.keys, count), logits_BxV)
    token = jnp.where(added, drawn, given)
    ended = (token[:, None] == at.stop).any(-1) | (count + 1 >= rule.length)
    return at._replace(
        tokens=jax.lax.dynamic_update_index_in_dim(at.tokens, token, at.column, axis=1),
        ends=jnp.where(added, at.column + 1, at.ends),
        column=at.column + 1,
        added=added,
        done=at.done | (added & ended),
    )


def _advance(rule: _Rule, params: Params, extra: Extra, at: _Progress) -> _Progress:
    """Read the last filled column and fill the next."""
    last = jax.lax.dynamic_slice_in_dim(at.tokens, at.column - 1, 1, axis=1)
    logits, state = rule.task.advance(params, extra, at.state, last)
    return _fill(rule, at._replace(state=state), logits)


_step = jax.jit(_advance, static_argnums=0, donate_argnums=3)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def _finish(rule: _Rule, params: Params, extra: Extra, at: _Progress) -> _Progress:
    def advance(at: _Progress) -> _Progress:
        return _advance(rule, params, extra, at)

    return jax.lax.while_loop(lambda at: ~at.done.all(), advance, at)


def _stream(
    rule: _Rule,
    params: Params,
    extra: Extra,
    at: _Progress,
    on_token: Callable[[int, int], None],
) -> _Progress:
    while True:
        tokens, column, added, done = jax.device_get((at.tokens, at.column, at.added, at.done))
        for row in np.flatnonzero(added):
            on_token(int(row), int(tokens[row, column - 1]))
        if done.all():
            return at
        at = _step(rule, params, extra, at)
