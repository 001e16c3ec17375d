"""Prompts of in-context regression, drawn on the device.

A prompt is N examples (x_i, y_i) and a query x_q with its answer y_q, all from one task w. The law
is put together from four parts, each a pure function of a key; a shift is another part.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxformer.recipe import Batch, ConfigError

__all__ = [
    "Prompts",
    "check_covariance",
    "fixed_covariance",
    "fixed_task",
    "gaussian_task",
    "linear_labels",
    "noisy_labels",
    "orthogonal_query",
    "quadratic_labels",
    "random_diagonal_covariance",
    "same_query",
    "scaled_query",
]

Covariance = Callable[[jax.Array], jax.Array]  # key -> R (d, d) with R R^T the covariance of x
TaskLaw = Callable[[jax.Array, int], jax.Array]  # (key, d) -> w (d,)
LabelFn = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]  # (key, x (L, d), w) -> y (L,)
QueryLaw = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]  # (key, R, x (N, d)) -> (d,)


def fixed_covariance(Lambda: jax.typing.ArrayLike) -> Covariance:
    """Draw x ~ N(0, Lambda) in every prompt; Lambda (d, d) symmetric positive definite."""
    check_covariance(Lambda)
    root = np.linalg.cholesky(np.asarray(Lambda))
    return lambda key: jnp.asarray(root)


def random_diagonal_covariance(
    d: int, draw: Callable[[jax.Array, tuple[int, ...]], jax.Array] = jax.random.exponential
) -> Covariance:
    """A new diagonal covariance in every prompt, its entries iid from `draw`; Exponential(1)."""
    return lambda key: jnp.diag(jnp.sqrt(draw(key, (d,))))


def gaussian_task(key: jax.Array, d: int) -> jax.Array:
    """Draw w ~ N(0, I)."""
    return jax.random.normal(key, (d,))


def fixed_task(w: Sequence[float]) -> TaskLaw:
    """The same w in every prompt."""
    return lambda key, d: jnp.asarray(w)


def linear_labels(key: jax.Array, x: jax.Array, w: jax.Array) -> jax.Array:
    """Label with <w, x>, without noise."""
    del key
    return x @ w


def noisy_labels(noise: float) -> LabelFn:
    """<w, x> + noise * N(0, 1)."""
    return lambda key, x, w: x @ w + noise * jax.random.normal(key, x.shape[:1], x.dtype)


def quadratic_labels(c: float) -> LabelFn:
    """<w, x> + c (x_1^2 - 1)."""
    return lambda key, x, w: x @ w + c * (x[:, 0] ** 2 - 1)


def same_query(key: jax.Array, R: jax.Array, x: jax.Array) -> jax.Array:
    """Draw x_q from the law of the examples."""
    return R @ jax.random.normal(key, x.shape[-1:])


def scaled_query(scale: float) -> QueryLaw:
    """`same_query` times `scale`."""
    return lambda key, R, x: scale * same_query(key, R, x)


def orthogonal_query(key: jax.Array, R: jax.Array, x: jax.Array) -> jax.Array:
    """`same_query` less its part in the span of the examples; zero unless N < d."""
    query = same_query(key, R, x)
    return query - jnp.linalg.pinv(x) @ (x @ query)


@dataclasses.dataclass(frozen=True)
class Prompts:
    """`draw_rows` of a `DeviceData`: {"x": (B, N, d), "y": (B, N), "x_q": (B, d), "y_q": (B,)}."""

    N: int
    covariance: Covariance
    task: TaskLaw = gaussian_task
    labels: LabelFn = linear_labels
    query: QueryLaw = same_query

    def __post_init__(self) -> None:
        if self.N < 1:
            raise ConfigError(f"N: {self.N} examples per prompt; give at least 1")

    def __call__(self, step_key: jax.Array, row_keys: jax.Array) -> Batch:
        del step_key  # prompts share nothing
        return jax.vmap(self._prompt)(row_keys)

    def _prompt(self, key: jax.Array) -> Batch:
        covariance_key, task_key, x_key, query_key, label_key = jax.random.split(key, 5)
        R = self.covariance(covariance_key)
        d = len(R)
        x = jax.random.normal(x_key, (self.N, d)) @ R.T
        x_q = self.query(query_key, R, x)
        y = self.labels(label_key, jnp.vstack([x, x_q]), self.task(task_key, d))
        return {"x": x, "y": y[:-1], "x_q": x_q, "y_q": y[-1]}


def check_covariance(Lambda: jax.typing.ArrayLike) -> None:
    """Raise `ConfigError` unless Lambda is a symmetric positive definite matrix."""
    matrix = np.asarray(Lambda)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ConfigError(f"Lambda: shape {matrix.shape}; give a (d, d) covariance matrix")
    asymmetry = np.abs(matrix - matrix.T).max()
    if asymmetry > 1e-5 * np.abs(matrix).max() or np.linalg.eigvalsh(matrix)[0] <= 0:
        raise ConfigError("Lambda: not symmetric positive definite; give a covariance matrix")
