"""What a backward pass starts from and ends with, whatever the kernel."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxformer.kernels.attention import tile
from jaxformer.kernels.attention.layout import Inputs, rows
from jaxformer.kernels.attention.operands import Sizes
from jaxformer.kernels.attention.request import Request


class Saved(NamedTuple):
    """Outputs and their cotangents, lengths padded: dO (B, H, L, Kv), two rows (B, H, L)."""

    do: jax.Array
    lse: jax.Array
    delta: jax.Array  # sum_j p_j dp_j - dLSE; where prob_mod is nonlinear, -dLSE alone

    @classmethod
    def of(cls, saved: Any, cotangents: Any, padded: Sizes, dtype: Any) -> Saved:
        """From (request, o, lse) and (do, dlse) in the caller's layout."""
        request, o, lse = saved
        do, dlse = cotangents
        sums = request.score_dtype
        dlse = jnp.where(lse == -jnp.inf, 0.0, dlse)  # a row that sees nothing is constant
        # sum_j p_j dp_j = dO . O, except under a nonlinear prob_mod: there it is a pass of its own.
        inner = 0.0
        if not request.rules.two_pass:
            inner = (do.astype(sums) * o.astype(sums)).sum(-1).swapaxes(1, 2)
        pad = ((0, 0), (0, 0), (0, padded.l - request.sizes.l))
        return cls(rows(do, padded.l, dtype), jnp.pad(lse, pad), jnp.pad(inner - dlse, pad))

    def dsink(self, sink: jax.Array | None) -> jax.Array | None:
        """The cotangent of the sink, (H,)."""
        if sink is None:
            return None
        return -(tile.probabilities(sink[:, None], self.lse) * self.delta).sum((0, 2))


def as_request(request: Request, d: Inputs) -> Request:
    """Cotangents of the inputs, as the caller gave them, in the structure of the request."""
    nothing = dict(mask=None, q_pos=None, k_pos=None, seed=None, origin=None)
    aux = {name: d.aux.get(name) for name in request.aux}
    return dataclasses.replace(request, q=d.q, k=d.k, v=d.v, sink=d.sink, aux=aux, **nothing)
