"""Sequences x_{t+1} = W x_t with W diagonal and unitary, drawn on the device or by quadrature."""

from __future__ import annotations

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from jaxformer.recipe import Batch, ConfigError

__all__ = ["STARTS", "Rotations", "quadrature", "rotated"]

STARTS = ("full_one", "gaussian", "sparse")


def rotated(theta: jax.typing.ArrayLike, x_1: jax.typing.ArrayLike, T: int) -> jax.Array:
    """The sequence x_t = exp(i theta (t - 1)) x_1, t = 1 .. T, of theta, x_1 (..., d): (..., d, T).

    Complex; x_1 is real.
    """
    angle = jnp.asarray(theta)[..., None] * jnp.arange(T)
    return jax.lax.complex(jnp.cos(angle), jnp.sin(angle)) * jnp.asarray(x_1)[..., None]


@dataclasses.dataclass(frozen=True)
class Rotations:
    """`draw_rows` of a `DeviceData`: {"x": (B, d, T) complex64}.

    W has the phases exp(i theta_j), theta_j ~ U[0, 2 pi), new in each sequence. x_1 is, by `start`:
    (1 .. 1), "full_one"; N(0, scale^2 I), "gaussian"; or one entry +-scale among zeros, "sparse".
    `scale` may be traced.
    """

    d: int
    T: int
    start: str
    scale: float = 1.0

    def __post_init__(self) -> None:
        check(self.d, self.T, self.start, self.scale)

    def __call__(self, step_key: jax.Array, row_keys: jax.Array) -> Batch:
        del step_key  # sequences share nothing
        return {"x": jax.vmap(self._sequence)(row_keys)}

    def _sequence(self, key: jax.Array) -> jax.Array:
        phase_key, start_key = jax.random.split(key)
        theta = jax.random.uniform(phase_key, (self.d,), maxval=2 * jnp.pi)
        return rotated(theta, self._first(start_key), self.T)

    def _first(self, key: jax.Array) -> jax.Array:
        if self.start == "gaussian":
            return self.scale * jax.random.normal(key, (self.d,))
        if self.start == "full_one":
            return jnp.ones(self.d)
        index_key, sign_key = jax.random.split(key)
        index = jax.random.randint(index_key, (), 0, self.d)
        return self.scale * jax.random.rademacher(sign_key) * jax.nn.one_hot(index, self.d)


def quadrature(d: int, T: int, start: str, scale: float = 1.0) -> Batch:
    """{"x": (n, d, T), "weight": (n,)} whose weighted mean is the mean over all `Rotations`.

    Exactly so for a polynomial of degree 6 in the entries of x_1 .. x_T and their conjugates, half
    of them conjugated: the squared error of linear attention. 3 T - 5 roots of unity take the
    place of each phase, Gauss-Hermite nodes that of the Gaussian: for few dimensions.
    """
    check(d, T, start, scale)
    # A prediction has phases from -(T - 2) to 2 (T - 2) of each theta: its square up to 3 (T - 2).
    count = 3 * (T - 2) + 1
    phases = 2 * np.pi * np.arange(count) / count
    thetas = np.array(list(itertools.product(phases, repeat=d)))
    if start == "gaussian":
        node, mass = np.polynomial.hermite_e.hermegauss(4)  # exact up to degree 7
        firsts = scale * np.array(list(itertools.product(node, repeat=d)))
        masses = np.prod(list(itertools.product(mass, repeat=d)), axis=1)
    elif start == "full_one":
        firsts, masses = np.ones((1, d)), np.ones(1)
    else:  # the error is odd in x_1: its square does not see the sign
        firsts, masses = scale * np.eye(d), np.ones(d)
    theta = np.repeat(thetas, len(firsts), axis=0)
    x_1 = np.tile(firsts, (len(thetas), 1))
    weight = np.tile(masses / masses.sum(), len(thetas)) / len(thetas)
    return {"x": rotated(theta, x_1, T), "weight": jnp.asarray(weight)}


def check(d: int, T: int, start: str, scale: float) -> None:
    if d < 1:
        raise ConfigError(f"d: {d} dimensions; give at least 1")
    if T < 3:
        raise ConfigError(f"T: {T} steps leave nothing to predict; give at least 3")
    if start not in STARTS:
        raise ConfigError(f"start: {start!r} is unknown; allowed: {', '.join(STARTS)}")
    if not isinstance(scale, jax.core.Tracer) and not scale > 0:
        raise ConfigError(f"scale: {scale}; give a positive number")
