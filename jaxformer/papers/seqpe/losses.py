"""The two losses that shape the space of position vectors (section 3.3)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxformer.tasks.losses import cross_entropy, is_correct


def contrastive(pivot_bxD: jax.Array, candidates_bxcxD: jax.Array, label_b: jax.Array) -> jax.Array:
    """L_ct (b,): the nearest position, the candidate `label`, must have the largest product."""
    logits = jnp.einsum("bD,bcD->bc", pivot_bxD, candidates_bxcxD)
    return cross_entropy(logits, label_b)


def finds_nearest(
    pivot_bxD: jax.Array, candidates_bxcxD: jax.Array, label_b: jax.Array
) -> jax.Array:
    """1 where the nearest position has the largest product, (b,)."""
    return is_correct(jnp.einsum("bD,bcD->bc", pivot_bxD, candidates_bxcxD), label_b)


def transfer(
    teacher_bxtxD: jax.Array, student_bxtxD: jax.Array, heads: int, beta: float = 1.0
) -> jax.Array:
    """L_tr, scalar: a block far away must be in itself as similar as the one that is trained on.

    T and S are the log-softmaxes of products within each block, per head. Both divergences, KL(T,
    S) and KL(S, T), are means over all b H t t entries; `beta` goes to the student, the rest to the
    teacher.
    """
    t, s = (_similarity(x, heads) for x in (teacher_bxtxD, student_bxtxD))
    fixed_t, fixed_s = jax.lax.stop_gradient((t, s))
    loss = beta * (_divergence(fixed_t, s) + _divergence(s, fixed_t))
    if beta < 1:
        loss += (1 - beta) * (_divergence(t, fixed_s) + _divergence(fixed_s, t))
    return loss


def _similarity(x_bxtxD: jax.Array, heads: int) -> jax.Array:
    """Log softmax(M M^T), (b, H, t, t)."""
    x = x_bxtxD.reshape(*x_bxtxD.shape[:2], heads, -1)
    return jax.nn.log_softmax(jnp.einsum("bthK,bshK->bhts", x, x).astype(jnp.float32))


def _divergence(p: jax.Array, q: jax.Array) -> jax.Array:
    """KL(p, q) of log-probabilities, as a mean over entries: 1 / t of a mean over rows."""
    return (jnp.exp(p) * (p - q)).mean()
