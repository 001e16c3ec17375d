"""A transformer built by hand that searches by merging paths (section 4).

Every token holds a set of vertices that can be reached from its own. Layers copy the sets of those
tokens whose vertex is in the set, so that what is reached doubles with each.

It is made of the library's parts, with attention that does not divide: a token reads, in full,
every token whose score is above a half.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxformer.nn.attention import Mix, Scores
from jaxformer.papers.graph_search.model import OneHot
from jaxformer.papers.graph_search.sequences import Tokens

LOUD = 4.0  # of the answer, beside the 1 of the token that is there


class Merging(nn.Module):
    """One layer; of each token the stream has its own vertex, the set that it reaches, what it was
    told by the edge it is in, and its position: (B, n, 3 words + n).

    `kind` "step": the source of an edge reads its target and the target its source, by position,
    and the last token reads the goal. "merge": a token reads those whose vertex it reaches. "read":
    the last token reads the targets of edges from the start that reach the goal.
    """

    kind: str
    words: int

    @nn.compact
    def __call__(self, x_BxnxD: jax.Array, *, mask_Bxn: jax.Array) -> jax.Array:
        w, n = self.words, x_BxnxD.shape[1]
        own, reached, told, place = jnp.split(x_BxnxD, [w, 2 * w, 3 * w], -1)
        holds = jnp.maximum(own, reached)
        at = jnp.arange(n)
        edges = at < n - 5
        source, target = edges & ((n - 5 - at) % 3 == 2), edges & ((n - 5 - at) % 3 == 1)
        last = at == n - 1
        # By linear maps of the stream, as in any layer of attention.
        if self.kind == "step":
            to = jnp.where(source, at + 1, jnp.where(target, at - 1, jnp.where(last, n - 3, n)))
            q, k, least = place @ jax.nn.one_hot(to, n), place, 0.5
        elif self.kind == "merge":
            is_vertex = jnp.arange(w) <= w - 5
            q, k, least = holds * is_vertex, own * is_vertex, 0.5
        else:
            q = jnp.concatenate([own, told], -1) * last[:, None]
            k, least = jnp.concatenate([told, holds], -1) * target[:, None], 1.5
        scores = Scores(1.0, name="scores")(q[:, :, None], k[:, :, None])
        p = (scores > least) * mask_Bxn[:, None, None, :].astype(scores.dtype)
        values = holds if self.kind == "merge" else own
        got = Mix(name="mix")(p, values[:, :, None])[:, :, 0]
        if self.kind == "read":
            return jnp.concatenate([own + LOUD * got, reached, told, place], -1)
        if self.kind == "step":
            told = told + jnp.where(source[:, None], 0, got)
            got = jnp.where(source[:, None], got, 0)
        reached = jnp.clip(reached + got, 0, 1)
        return jnp.concatenate([own, reached, told, place], -1)


class PathMerger(nn.Module):
    """Tokens (B, n) to logits (B, n, words) by `depth` layers, and one that reads the answer off.

    Right for look-aheads of at most 2^(depth - 1).
    """

    length: int
    depth: int

    @nn.compact
    def __call__(self, tokens_Bxn: jax.Array, **_: Any) -> jax.Array:
        tokens = Tokens(self.length)
        embed = OneHot(tokens.words, 2 * tokens.words, self.length, name="embed")
        x_BxnxD, valid = embed(tokens_Bxn), tokens_Bxn != tokens.pad
        kinds = ("step", *["merge"] * (self.depth - 1), "read")
        for i, kind in enumerate(kinds):
            x_BxnxD = Merging(kind, tokens.words, name=f"block_{i}")(x_BxnxD, mask_Bxn=valid)
        return x_BxnxD[..., : tokens.words]
