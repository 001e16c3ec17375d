"""Grouped-query attention in which the norms of keys say how many queries a key head serves.

Symbols of the paper: H query heads, G key-value heads, u_g the norm of key head g, n_g how many
query heads it serves, sum n_g = H.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxformer.errors import ConfigError
from jaxformer.models.transformer import Transformer
from jaxformer.models.variant import Variant
from jaxformer.nn.attention import Attention, Fused
from jaxformer.nn.cache import DecodeUnsupported
from jaxformer.nn.make import Make, swap

STATE = "allocation"  # the collection of splits and caches, part of `TrainState.extra`

# ------------------------------------------------------------------------------ from norms to n


def key_norms(k_BxSxGxK: jax.Array) -> jax.Array:
    """U (G,): the Frobenius norm of each key head, summed over the batch. It has no gradient."""
    k = jax.lax.stop_gradient(k_BxSxGxK).astype(jnp.float32)
    return jnp.sqrt(jnp.square(k).sum((1, 3))).sum(0)


def min_max(u_G: jax.Array) -> jax.Array:
    """U stretched over [0, 1]; all alike give 0."""
    low, high = u_G.min(), u_G.max()
    return (u_G - low) / jnp.where(high > low, high - low, 1.0)


def equal_split(kv_heads: int, heads: int) -> jax.Array:
    """H / G for each head, the first of them one more where G does not divide H."""
    more = jnp.arange(kv_heads) < heads % kv_heads
    return (heads // kv_heads + more).astype(jnp.int32)


def shares(w_G: jax.Array, heads: int) -> jax.Array:
    """N = w / sum(w) H rounded, half to even; not yet of sum H.

    Weights that are all 0, or not finite, give the equal split, where the authors' code gives NaN.
    """
    total = w_G.sum()
    usable = jnp.isfinite(total) & (total > 0)
    n = jnp.round(w_G / jnp.where(usable, total, 1.0) * heads)
    return jnp.where(usable, n.astype(jnp.int32), equal_split(len(w_G), heads))


def repair(n_G: jax.Array, heads: int) -> jax.Array:
    """Of sum H: one less for the largest while there are too many, one more for the smallest."""

    def step(n: jax.Array) -> jax.Array:
        return jnp.where(n.sum() > heads, n.at[n.argmax()].add(-1), n.at[n.argmin()].add(1))

    return jax.lax.while_loop(lambda n: n.sum() != heads, step, n_G)


def repair_at_random(
    n_G: jax.Array, heads: int, pick: Callable[[jax.Array], jax.Array]
) -> jax.Array:
    """Of sum H: one more or less for the heads `pick(0)`, `pick(1)`, ...; never less than none."""

    def step(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        n, draws = carry
        g = pick(draws)
        change = jnp.where(n.sum() > heads, -(n[g] > 0).astype(jnp.int32), 1)
        return n.at[g].add(change), draws + 1

    start = (n_G, jnp.zeros((), jnp.int32))
    return jax.lax.while_loop(lambda carry: carry[0].sum() != heads, step, start)[0]


def kv_of_head(n_G: jax.Array, heads: int) -> jax.Array:
    """(H,): the key head that each query head reads; the first n_1 read the first, and so on."""
    return jnp.searchsorted(jnp.cumsum(n_G), jnp.arange(heads), side="right")


# ---------------------------------------------------------------- where a layer's split is from


class BatchSplit(nn.Module):
    """KDGQA: from the keys of every batch, in training and in evaluation.

    Its answers depend on what else is in the batch: evaluate with one batch size.
    """

    def __call__(self, k_BxSxGxK: jax.Array, heads: int) -> jax.Array:
        return repair(shares(min_max(key_norms(k_BxSxGxK)), heads), heads)


def difference(cache_G: jax.Array, u_G: jax.Array) -> jax.Array:
    """W of DGQA: how far norms have moved."""
    return jnp.abs(cache_G - u_G)


@dataclasses.dataclass(frozen=True)
class MovingAverage:
    """w of DGQA: beta u + (1 - beta) cache."""

    beta: float = 0.9

    def __call__(self, cache_G: jax.Array, u_G: jax.Array) -> jax.Array:
        return self.beta * u_G + (1 - self.beta) * cache_G


RULES: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "diff": difference,
    "ema": MovingAverage(),
}


class WindowSplit(nn.Module):
    """DGQA: refreshed at every `window`-th pass of training, by a `rule` of cache and norms.

    The cache is then (cache + u) / window. Split, cache, counter and seed of the random repairs are
    variables; where they cannot change, in evaluation, the last split holds.

    `epoch` restarts the counter after so many passes, and `by_batch` makes evaluation follow the
    keys of its batch: both as the authors' code does.
    """

    rule: Callable[[jax.Array, jax.Array], jax.Array] = difference
    window: int = 300
    epoch: int | None = None
    by_batch: bool = False

    @nn.compact
    def __call__(self, k_BxSxGxK: jax.Array, heads: int) -> jax.Array:
        if self.window < 1:
            raise ConfigError(f"model.window={self.window}: must be at least 1")
        kv_heads = k_BxSxGxK.shape[2]
        split = self.variable(STATE, "split", lambda: equal_split(kv_heads, heads))
        cache = self.variable(STATE, "cache", jnp.zeros, (kv_heads,))
        count = self.variable(STATE, "count", jnp.zeros, (), jnp.int32)
        seed = self.variable(STATE, "seed", self._seed)
        training = self.is_mutable_collection(STATE) and not self.is_initializing()
        if not training and not self.by_batch:
            return split.value
        key = jax.random.fold_in(jax.random.key(seed.value), count.value)
        u = key_norms(k_BxSxGxK)
        n = shares(self.rule(cache.value, u), heads)
        n = repair_at_random(n, heads, lambda i: self.pick(key, i, kv_heads))
        if not training:
            return n
        passes = count.value if self.epoch is None else count.value % self.epoch
        due = passes % self.window == 0
        split.value = jnp.where(due, n, split.value)
        cache.value = jnp.where(due, (cache.value + u) / self.window, cache.value)
        count.value = count.value + 1
        return split.value

    def _seed(self) -> jax.Array:
        return jax.random.bits(self.make_rng("params"), (), jnp.uint32)

    def pick(self, key: jax.Array, i: jax.Array, kv_heads: int) -> jax.Array:
        """The i-th head that a repair draws."""
        return jax.random.randint(jax.random.fold_in(key, i), (), 0, kv_heads)


# ------------------------------------------------------------------------- cores of attention


class Allocated(nn.Module):
    """A core of `Attention` in which key heads serve as many query heads as `split` says.

    Keys and values are gathered by head, so that shapes, and the program, do not depend on it.
    """

    split: Make
    core: Make = Make(Fused)

    @nn.compact
    def __call__(
        self, q_BxLxHxK: jax.Array, k_BxSxGxK: jax.Array, v_BxSxGxK: jax.Array, **options: Any
    ) -> jax.Array:
        if options.get("q_pos") is not None:
            raise DecodeUnsupported(self)  # its split would change within a sequence
        heads = q_BxLxHxK.shape[2]
        n_G = self.split(name="split")(k_BxSxGxK, heads)
        kv_H = kv_of_head(n_G, heads)
        k_BxSxHxK, v_BxSxHxK = (jnp.take(x, kv_H, axis=2) for x in (k_BxSxGxK, v_BxSxGxK))
        return self.core(name="core")(q_BxLxHxK, k_BxSxHxK, v_BxSxHxK, **options)


class Perturbed(nn.Module):
    """PGQA, a control: what each query head gives, less noise of the same mean and variance.

    The noise is on outputs of attention, as in the authors' code; the paper speaks of its weights.
    """

    core: Make = Make(Fused)

    @nn.compact
    def __call__(
        self, q_BxLxHxK: jax.Array, k_BxSxGxK: jax.Array, v_BxSxGxK: jax.Array, **options: Any
    ) -> jax.Array:
        y_BxLxHxK = self.core(name="core")(q_BxLxHxK, k_BxSxGxK, v_BxSxGxK, **options)
        if self.has_rng("dropout"):
            key = self.make_rng("dropout")
        else:  # in evaluation: always the same noise, but of each layer its own
            key = jax.random.key(zlib.crc32("/".join(self.path).encode()))
        _, length, heads, size = y_BxLxHxK.shape
        groups = k_BxSxGxK.shape[2]
        uniform = jax.random.uniform(key, (groups, heads // groups, length * size))
        return perturb(y_BxLxHxK, uniform)


def perturb(y_BxLxHxK: jax.Array, uniform_GxRxN: jax.Array) -> jax.Array:
    """O - R_b: numbers R (G, H / G, L K), one draw for all rows, standardised to those of O.

    The diagonal of each group's matrix is 0. Means and deviations, unbiased, are over L and K.
    """
    batch, length, heads, size = y_BxLxHxK.shape
    groups, rows, columns = uniform_GxRxN.shape
    r = uniform_GxRxN * (1 - jnp.eye(rows, columns))
    deviation = r.std(-1, keepdims=True, ddof=1)
    r = (r - r.mean(-1, keepdims=True)) / jnp.where(deviation == 0, 1.0, deviation)
    o = y_BxLxHxK.swapaxes(1, 2).reshape(batch, groups, rows, columns).astype(jnp.float32)
    o = o - (r * o.std(-1, keepdims=True, ddof=1) + o.mean(-1, keepdims=True))
    return o.reshape(batch, heads, length, size).swapaxes(1, 2).astype(y_BxLxHxK.dtype)


SCHEMES = ("gqa", "kdgqa", "dgqa_diff", "dgqa_ema", "pgqa")


def core(scheme: str, window: int = 300, epoch: int | None = None, by_batch: bool = False) -> Make:
    """The core of attention that a scheme's name stands for.

    Raises:
        ConfigError: no such scheme.
    """
    if scheme not in SCHEMES:
        raise ConfigError(f"model.scheme={scheme!r}: must be one of {', '.join(SCHEMES)}")
    if scheme == "gqa":
        return Make(Fused)
    if scheme == "pgqa":
        return Make(Perturbed)
    if scheme == "kdgqa":
        return Make(Allocated, split=Make(BatchSplit))
    rule = RULES[scheme.removeprefix("dgqa_")]
    split = Make(WindowSplit, rule=rule, window=window, epoch=epoch, by_batch=by_batch)
    return Make(Allocated, split=split)


def grouped(model: Any, kv_heads: int, core: Make) -> Any:
    """A model with this core and so many key-value heads in all its attention."""
    return swap(model, Attention, Make(Attention, kv_heads=kv_heads, core=core))


def variant(trunk: Transformer, length: int) -> Variant:
    """DGQA with half as many key heads, for any plain model; it does not decode."""
    del length
    kv_heads = trunk.heads // 2 if trunk.heads % 2 == 0 else 1
    return Variant(trunk.attention().replace(kv_heads=kv_heads, core=core("dgqa_diff")))
