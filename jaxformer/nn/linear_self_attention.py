"""Linear self-attention with merged matrices, the layer of the in-context-learning theory papers.

Tokens are columns, as in those papers: E is (D, L). The key and query matrices are merged into
W^KQ (D, D), projection and value into W^PV (P, D); there is no softmax and no residual. Complex
tokens are conjugated on the key side. Products run at full precision on every backend.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

__all__ = ["causal_linear_self_attention", "linear_self_attention"]


def linear_self_attention(
    e_DxL: jax.Array,
    w_pv_PxD: jax.Array,
    w_kq_DxD: jax.Array,
    rho: jax.typing.ArrayLike,
    read_DxM: jax.Array | None = None,
) -> jax.Array:
    """W^PV E (E^* W^KQ E) / rho, (..., P, L): every token reads all of them, itself included.

    Or it reads `read_DxM`, such as the tokens without the query. Associated as W^PV (E E^*) W^KQ E,
    so linear in L. `e_DxL` may have leading batch axes.
    """
    read_DxM = e_DxL if read_DxM is None else read_DxM
    with jax.default_matmul_precision("highest"):
        s_DxD = read_DxM @ jnp.conj(read_DxM).mT
        return (w_pv_PxD @ s_DxD) @ (w_kq_DxD @ e_DxL) / rho


def causal_linear_self_attention(
    e_DxL: jax.Array, w_pv_PxD: jax.Array, w_kq_DxD: jax.Array, rho_L: jax.typing.ArrayLike
) -> jax.Array:
    """W^PV E_t E_t^* W^KQ e_t / rho_t in column t, (..., P, L), where E_t is the first t columns.

    By the scores E^* W^KQ E, L^2 numbers per sequence, where these are fewer than L D^2: those of
    the running sums E_t E_t^*, by which longer sequences go. Measured on a CPU with gradients, 2000
    complex sequences of D=10, L=19: 26 ms instead of 220.
    """
    D, L = e_DxL.shape[-2:]
    with jax.default_matmul_precision("highest"):
        query_DxL = w_kq_DxD @ e_DxL
        if L <= D**2:
            read_DxL = e_DxL @ jnp.triu(jnp.conj(e_DxL).mT @ query_DxL)
        else:
            outer_DxDxL = jnp.einsum("...dl,...el->...del", e_DxL, jnp.conj(e_DxL))
            read_DxL = jnp.einsum("...del,...el->...dl", jnp.cumsum(outer_DxDxL, -1), query_DxL)
        return w_pv_PxD @ read_DxL / rho_L
