"""Attention as arithmetic on paper: products of the size that the mask leaves, to be counted.

Kernels hide their products from whoever walks a program, and loops of unknown length count once.
Traced under `jaxformer.kernels.target.on_paper`, every call is this one instead.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxformer.kernels.attention.request import Request
from jaxformer.kernels.attention.tiling import visible_scores
from jaxformer.kernels.dispatch import Refusal
from jaxformer.kernels.target import target


def refuse(request: Request) -> Refusal | None:
    where = target()
    return None if where.platform == "paper" else Refusal(str(where), "its values mean nothing")


def counted(request: Request) -> tuple[jax.Array, jax.Array]:
    """Shapes (B, L, H, Kv) and (B, H, L); every query meets the mean number of visible keys."""
    h, g = request.sizes.h, request.k.shape[2]
    heads = np.array(request.rules.head_map or np.arange(h) // (h // g))
    keys = max(round(visible_scores(request) / request.sizes.l), 1)
    k, v = request.k[:, :keys, heads], request.v[:, :keys, heads]
    s = jnp.einsum("blhk,bshk->bhls", request.q, k)
    return jnp.einsum("bhls,bshk->blhk", s, v), s.sum(-1).astype(request.score_dtype)
