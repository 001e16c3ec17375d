"""The arithmetic of one tile: pure functions that every implementation shares.

The matrix products stay with the implementation; everything between them is here. Tiles are
float32 (float64 for float64 inputs) and may have any leading axes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxformer.kernels.attention import operands as ops
from jaxformer.kernels.attention.masks import Mask, positions_operand
from jaxformer.kernels.attention.mods import drop
from jaxformer.kernels.attention.operands import Block, Idx, Operand, PerK, PerQ, Sizes
from jaxformer.kernels.attention.request import Request, Rules


class View(NamedTuple):
    """What a tile knows of its place: positions, visibility, tiles of the constant operands."""

    idx: Idx
    keep: jax.Array | None  # None: everything is visible
    aux: dict[str, jax.Array]
    seed: jax.Array | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Constants:
    """The operands of a call that have no gradient, in kernel layout."""

    mask: Mask
    mask_operands: Any
    aux: dict[str, Operand]
    q_pos: Operand | None
    k_pos: Operand | None
    seed: jax.Array | None
    origin: jax.Array | None
    sizes: Sizes = dataclasses.field(metadata={"static": True})
    padded: Sizes = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(cls, request: Request, padded: Sizes) -> Constants:
        sizes = request.sizes
        return cls(
            mask=request.mask,
            mask_operands=ops.prepare(request.mask.operands(sizes), sizes, padded),
            aux={
                name: x.prepare(sizes, padded)
                for name, x in request.aux.items()
                if not x.differentiable
            },
            q_pos=positions_operand(request.q_pos, PerQ, sizes, padded),
            k_pos=positions_operand(request.k_pos, PerK, sizes, padded),
            seed=request.seed,
            origin=request.origin,
            sizes=sizes,
            padded=padded,
        )

    def view(self, at: Block, *, partial: bool) -> View:
        """The surroundings of tile `at`; a tile that is not partial skips the mask."""
        idx = ops.indices(self.sizes, at, self.q_pos, self.k_pos)
        if self.origin is not None:
            idx = idx._replace(b=idx.b + self.origin[0], h=idx.h + self.origin[1])
        keep = None
        if partial:
            keep = self.mask.elem(idx, ops.read(self.mask_operands, at))
            rowcol = ops.indices(self.sizes, at)
            if self.padded.l > self.sizes.l:
                keep = keep & (rowcol.q < self.sizes.l)
            if self.padded.s > self.sizes.s:
                keep = keep & (rowcol.k < self.sizes.s)
        return View(idx, keep, ops.read(self.aux, at), self.seed)


def scores(rules: Rules, raw: jax.Array, view: View, aux: dict[str, jax.Array]) -> jax.Array:
    """Scaled products -> modified and masked scores."""
    s = raw
    if rules.score_mod is not None:
        s = rules.score_mod(s, view.idx, {**view.aux, **aux})
    return s if view.keep is None else jnp.where(view.keep, s, -jnp.inf)


def probabilities(s: jax.Array, lse: jax.Array) -> jax.Array:
    """exp(s - lse); 0 on rows that see nothing, whose lse is -inf."""
    return jnp.exp(s - jnp.where(lse == -jnp.inf, jnp.inf, lse))


def normaliser(m: jax.Array, l: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(divisor, LSE) of rows from their maximum and sum; 1 and -inf where nothing was seen."""
    seen = l > 0
    l = jnp.where(seen, l, 1.0)
    return l, jnp.where(seen, jnp.where(seen, m, 0.0) + jnp.log(l), -jnp.inf)


def weights(rules: Rules, p: jax.Array, view: View, aux: dict[str, jax.Array]) -> jax.Array:
    """Probabilities -> the weights of the values."""
    w = p
    if rules.prob_mod is not None:
        w = rules.prob_mod.fn(w, view.idx, {**view.aux, **aux})
        if view.keep is not None:  # a quantiser may not map 0 to 0
            w = jnp.where(view.keep, w, 0.0)
    if rules.dropout_rate:
        w = drop(w, rules.dropout_rate, view.seed, view.idx)
    return w


class Pulled(NamedTuple):
    """A tile of the backward pass: weights, and cotangents of the scaled products and operands."""

    w: jax.Array
    raw: jax.Array
    parts: Any
    p_dp: jax.Array  # its row sums are what softmax subtracts


def pull_back(
    rules: Rules,
    raw: jax.Array,
    dw: jax.Array,
    lse: jax.Array,
    delta: jax.Array,
    view: View,
    parts: Any,
    spread: Callable[[Any], dict[str, jax.Array]],
) -> Pulled:
    """The backward pass between the products.

    `raw` are the scaled products, `dw` the cotangents of the weights (dO V^T), `lse` and `delta`
    one number per row: delta_i = sum_j p_ij dp_ij - dLSE_i, the D of FlashAttention's backward
    pass (arXiv:2205.14135, appendix B.4) less the cotangent of the normaliser.
    """
    s, score_vjp = jax.vjp(lambda r, x: scores(rules, r, view, spread(x)), raw, parts)
    p = probabilities(s, lse[..., None])
    w, prob_vjp = jax.vjp(lambda p, x: weights(rules, p, view, spread(x)), p, parts)
    dp, from_probs = prob_vjp(dw)
    ds = p * (dp - delta[..., None])
    draw, from_scores = score_vjp(ds)
    return Pulled(w, draw, jax.tree.map(jnp.add, from_probs, from_scores), p * dp)
