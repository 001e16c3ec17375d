"""Softmax multi-head attention, fused or opened up, with a cache for decoding.

`Fused` and `Unfused` are two cores for the same parameters: the first is one operation that never
holds the scores, the second spells out `Scores`, `Softmax` and `Mix` as modules for everything
that must see or change them. `jaxformer.nn.make.swap(model, Fused, Unfused)` goes over.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxformer.errors import ConfigError
from jaxformer.kernels.attention import Full, KeyPadding, Mask, PerK, PerQ, attention, dense
from jaxformer.kernels.attention import operands as ops
from jaxformer.kernels.attention.masks import positions_operand
from jaxformer.kernels.attention.mods import drop, seed_of
from jaxformer.nn.cache import KVCache
from jaxformer.nn.einsum import Einsum, KernelInit, fan_in_normal
from jaxformer.nn.make import Make
from jaxformer.nn.position import (
    At,
    Joins,
    Mods,
    Position,
    ReadsContent,
    Scheme,
    stream_positions,
)

FULL = Full()


class Fused(nn.Module):
    """softmax(Q K^T / sqrt(K)) V by `jaxformer.kernels.attention`."""

    @nn.compact
    def __call__(
        self,
        q_BxLxHxK: jax.Array,
        k_BxSxGxK: jax.Array,
        v_BxSxGxK: jax.Array,
        *,
        mask: Mask,
        mods: Mods,
        scale: float | None = None,
        q_pos: jax.Array | None = None,
        k_pos: jax.Array | None = None,
        dropout: float = 0.0,
    ) -> jax.Array:
        """(B, L, H, K); `q_pos` and `k_pos` are the indices that the mask goes by."""
        return attention(
            q_BxLxHxK,
            k_BxSxGxK,
            v_BxSxGxK,
            scale=scale,
            mask=mask,
            score_mod=mods.score_mod,
            prob_mod=mods.prob_mod,
            aux=mods.aux,
            q_pos=q_pos,
            k_pos=k_pos,
            dropout=(dropout, self.make_rng("dropout")) if dropout else None,
        )


class Scores(nn.Module):
    """Q K^T times the scale, 1 / sqrt(K) by default, in float32: (B, H, L, S)."""

    scale: float | None = None

    @nn.compact
    def __call__(self, q_BxLxHxK: jax.Array, k_BxSxHxK: jax.Array) -> jax.Array:
        equation = "BLHK,BSHK->BHLS"
        s = jnp.einsum(equation, q_BxLxHxK, k_BxSxHxK, preferred_element_type=jnp.float32)
        return s / math.sqrt(q_BxLxHxK.shape[-1]) if self.scale is None else s * self.scale


class Softmax(nn.Module):
    """Softmax over the keys that are `visible`, in float32; a row without any is 0."""

    def __call__(self, s_BxHxLxS: jax.Array, visible: jax.Array) -> jax.Array:
        s = jnp.where(visible, s_BxHxLxS.astype(jnp.float32), -jnp.inf)
        # No gradient passes the largest score: it cancels. Where a compiler computes scores twice
        # and they differ in the last bit, none is the largest, and the gradient of max was NaN.
        most = jax.lax.stop_gradient(s.max(-1, keepdims=True))
        p = jnp.exp(s - jnp.where(jnp.isfinite(most), most, 0.0))
        total = p.sum(-1, keepdims=True)
        return p / jnp.where(total == 0, 1.0, total)


class Mix(nn.Module):
    """P V: (B, L, H, K), accumulated in float32 and returned in the dtype of V."""

    @nn.compact
    def __call__(self, p_BxHxLxS: jax.Array, v_BxSxHxK: jax.Array) -> jax.Array:
        p_BxHxLxS = p_BxHxLxS.astype(v_BxSxHxK.dtype)
        return jnp.einsum("BHLS,BSHK->BLHK", p_BxHxLxS, v_BxSxHxK)


class Unfused(nn.Module):
    """The same attention as `Fused` with every step a module; memory is quadratic."""

    @nn.compact
    def __call__(
        self,
        q_BxLxHxK: jax.Array,
        k_BxSxGxK: jax.Array,
        v_BxSxGxK: jax.Array,
        *,
        mask: Mask,
        mods: Mods,
        scale: float | None = None,
        q_pos: jax.Array | None = None,
        k_pos: jax.Array | None = None,
        dropout: float = 0.0,
    ) -> jax.Array:
        """(B, L, H, K); `q_pos` and `k_pos` are the indices that the mask goes by."""
        batch, length, heads, _ = q_BxLxHxK.shape
        sizes = ops.Sizes(batch, heads, length, k_BxSxGxK.shape[1])
        whole = ops.Block.whole(sizes)
        rows, columns = (
            positions_operand(q_pos, PerQ, sizes),
            positions_operand(k_pos, PerK, sizes),
        )
        at = ops.indices(sizes, whole, rows, columns)
        aux = ops.read(ops.prepare(mods.aux or {}, sizes, sizes), whole)
        visible = dense(mask, *sizes, q_pos, k_pos)
        groups = heads // k_BxSxGxK.shape[2]
        k_BxSxHxK, v_BxSxHxK = (jnp.repeat(x, groups, axis=2) for x in (k_BxSxGxK, v_BxSxGxK))

        s_BxHxLxS = Scores(scale, name="scores")(q_BxLxHxK, k_BxSxHxK)
        if mods.score_mod is not None:
            s_BxHxLxS = mods.score_mod(s_BxHxLxS, at, aux)
        p_BxHxLxS = Softmax(name="softmax")(s_BxHxLxS, visible)
        if mods.prob_mod is not None:
            p_BxHxLxS = jnp.where(visible, mods.prob_mod.fn(p_BxHxLxS, at, aux), 0.0)
        if dropout:
            p_BxHxLxS = drop(p_BxHxLxS, dropout, seed_of(self.make_rng("dropout")), at)
        return Mix(name="mix")(p_BxHxLxS, v_BxSxHxK)


@dataclasses.dataclass(frozen=True)
class LogLength:
    """A scale of scores for sequences longer than those trained on: K^-0.5 sqrt(ln S / ln trained).

    It keeps the entropy of attention about where it was (Jin et al. 2023, arXiv 2306.08645).
    """

    trained: int  # keys of a sequence in training

    def __post_init__(self) -> None:
        if self.trained < 2:
            raise ConfigError(f"LogLength.trained={self.trained}: must be at least 2 positions")

    def __call__(self, keys: int, head_size: int) -> float:
        return math.sqrt(math.log(keys) / math.log(self.trained) / head_size)


class Attention(nn.Module):
    """Multi-head softmax attention, a `jaxformer.nn.block.Mixer`.

    Query head h reads key-value head h // (heads / kv_heads). The head size defaults to
    width / heads. `position` acts inside (`RoPE`, `ALiBi`); `window` is what this layer sees at
    most, of what the mask of a call lets it see; `dropout` is that of probabilities. `scheme`, of
    a call, is a position scheme that layers share, in place of `position`'s own changes of scores.

    Raises:
        ConfigError: heads do not divide the width, or kv_heads the heads.
    """

    heads: int
    kv_heads: int | None = None
    head_size: int | None = None
    value_size: int | None = None  # of a head of values; None: head_size
    scale: float | LogLength | None = None  # of the scores; None: head_size ** -0.5
    position: Make = Make(Position)
    window: Mask = FULL
    use_bias: bool = True
    out_bias: bool | None = None  # None: as use_bias
    dropout: float = 0.0
    core: Make = Make(Fused)
    kernel_init: KernelInit = fan_in_normal

    @nn.compact
    def __call__(
        self,
        x_BxLxD: jax.Array,
        kv_BxSxD: jax.Array | None = None,
        *,
        mask: Mask,
        positions: jax.Array | None = None,
        train: bool = False,
        decode: bool = False,
        scheme: Scheme | None = None,
    ) -> jax.Array:
        width = x_BxLxD.shape[-1]
        kv_heads, head_size = head_sizes(width, self.heads, self.kv_heads, self.head_size)

        def project(x: jax.Array, heads: int, name: str, size: int = head_size) -> jax.Array:
            equation = "...D,DHK->...HK"
            init = self.kernel_init(equation)
            features = (heads, size)
            return Einsum(equation, features, self.use_bias, kernel_init=init, name=name)(x)

        source_BxSxD = x_BxLxD if kv_BxSxD is None else kv_BxSxD
        q_BxLxHxK = project(x_BxLxD, self.heads, "query")
        k_BxSxGxK = project(source_BxSxD, kv_heads, "key")
        v_BxSxGxK = project(source_BxSxD, kv_heads, "value", self.value_size or head_size)

        position = self.position(name="position")
        at_L = stream_positions(self, x_BxLxD, positions, decode)
        at_S = at_L if kv_BxSxD is None else jnp.arange(source_BxSxD.shape[1])
        q_BxLxHxK, k_BxSxGxK = position.rotate(q_BxLxHxK, at_L), position.rotate(k_BxSxGxK, at_S)
        if isinstance(scheme, Joins):
            q_BxLxHxK, k_BxSxGxK = scheme.join(q_BxLxHxK, k_BxSxGxK)

        q_pos = k_pos = None
        if decode and kv_BxSxD is None:
            k_BxSxGxK, v_BxSxGxK = KVCache(name="kv_cache")(k_BxSxGxK, v_BxSxGxK, at_L)
            q_pos, k_pos = at_L, jnp.arange(k_BxSxGxK.shape[1], dtype=jnp.int32)
            mask = mask & KeyPadding(at_L[:, -1] + 1)
        # Where positions are given, or a cache has been read, rows and columns do not tell them.
        q_at, k_at = (at_L, at_S) if positions is not None else (q_pos, k_pos)
        y_BxLxHxK = self.attend(
            q_BxLxHxK,
            k_BxSxGxK,
            v_BxSxGxK,
            mask=mask if self.window == FULL else mask & self.window,
            scheme=position if scheme is None else scheme,
            at=At(x_BxLxD.shape[1], k_BxSxGxK.shape[1], q_at, k_at),
            q_pos=q_pos,
            k_pos=k_pos,
            train=train,
        )
        out_bias = self.use_bias if self.out_bias is None else self.out_bias
        equation = "...HK,HKD->...D"
        init = self.kernel_init(equation)
        return Einsum(equation, (width,), out_bias, kernel_init=init, name="out")(y_BxLxHxK)

    def attend(
        self,
        q_BxLxHxK: jax.Array,
        k_BxSxGxK: jax.Array,
        v_BxSxGxK: jax.Array,
        *,
        mask: Mask,
        scheme: Scheme,
        at: At,
        q_pos: jax.Array | None = None,
        k_pos: jax.Array | None = None,
        train: bool = False,
    ) -> jax.Array:
        """(B, L, H, K) of what was projected; `q_pos` and `k_pos` are what the mask goes by."""
        scale = self.scale
        # A scheme may have joined more to queries and keys, values may have a size of their own.
        head_size = self.head_size or q_BxLxHxK.shape[-1]
        head_size = v_BxSxGxK.shape[-1] if self.value_size is None else head_size
        if isinstance(scale, LogLength):
            scale = scale(k_BxSxGxK.shape[1], head_size)
        elif scale is None and isinstance(scheme, (Joins, ReadsContent)):
            scale = head_size**-0.5
        if isinstance(scheme, ReadsContent):
            assert scale is not None
            scheme = scheme.read(q_BxLxHxK, k_BxSxGxK, scale)
        return self.core(name="core")(
            q_BxLxHxK,
            k_BxSxGxK,
            v_BxSxGxK,
            mask=mask,
            mods=scheme.mods(self.heads, at),
            scale=scale,
            q_pos=q_pos,
            k_pos=k_pos,
            dropout=self.dropout if train else 0.0,
        )


def head_sizes(
    width: int, heads: int, kv_heads: int | None = None, head_size: int | None = None
) -> tuple[int, int]:
    """(key-value heads, head size), with their defaults filled in.

    Raises:
        ConfigError: heads do not divide the width, or kv_heads the heads.
    """
    if head_size is None and (heads < 1 or width % heads):
        raise ConfigError(
            f"model.heads={heads}: must divide the width {width} (allowed: {_divisors(width)}), "
            "or give model.head_size"
        )
    kv_heads = heads if kv_heads is None else kv_heads
    if kv_heads < 1 or heads % kv_heads:
        raise ConfigError(
            f"model.kv_heads={kv_heads}: must divide the {heads} heads "
            f"(allowed: {_divisors(heads)})"
        )
    return kv_heads, width // heads if head_size is None else head_size


def _divisors(n: int) -> str:
    return ", ".join(str(i) for i in range(1, n + 1) if n % i == 0)
