"""Attention of random scores: where quantisers of probabilities are compared without a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxformer.compress.quantizers import Log, Uniform
from jaxformer.compress.search import each, least

HEADS, QUERIES, KEYS, SIZE = 8, 64, 64, 64
SPREAD = 2.5  # the deviation of scores


def attention(seed: int) -> tuple[jax.Array, jax.Array]:
    """Probabilities (1, H, L, S), the softmax of normal scores, and normal values (1, H, S, K)."""
    of_scores, of_values = jax.random.split(jax.random.key(seed))
    scores = SPREAD * jax.random.normal(of_scores, (1, HEADS, QUERIES, KEYS))
    return jax.nn.softmax(scores), jax.random.normal(of_values, (1, HEADS, KEYS, SIZE))


def output_error(p_hat: jax.Array, p: jax.Array, v: jax.Array) -> jax.Array:
    """|P^ V - P V|^2 / |P V|^2."""
    return jnp.square((p_hat - p) @ v).sum() / jnp.square(p @ v).sum()


def best_state(
    quantizer: Any, candidates: Mapping[str, jax.Array], p: jax.Array, v: jax.Array
) -> tuple[dict[str, jax.Array], float]:
    """The candidate of least output error, and that error."""
    errors = each(lambda state: output_error(quantizer(p, **state), p, v), candidates)
    return {name: x[0] for name, x in least(candidates, errors, 1).items()}, float(errors.min())


def baselines(bits: int, p: jax.Array, v: jax.Array) -> dict[str, float]:
    """The output error of uniform codes at the best scale, of log2 and of log sqrt(2)."""
    most = jnp.linspace(0.02, 1.0, 200) * p.max()
    scales = {"scale": most / (2**bits - 1), "zero": jnp.zeros_like(most)}
    found = {"uniform": best_state(Uniform(bits), scales, p, v)[1]}
    for name, steps in (("log2", 1), ("log sqrt 2", 2)):
        found[name] = float(output_error(Log(bits, steps)(p, 1.0), p, v))
    return found
