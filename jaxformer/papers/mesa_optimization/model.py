"""One causal linear self-attention layer that learns x_{t+1} = W x_t in context (2405.16845).

    e_t = (x_t ; x_{t-1}),  x_0 = 0,  E_t = [e_1 .. e_t]                                   (2d, t)
    yhat_t = W^PV E_t E_t^* W^KQ e_t / (t - 1),   t = 2 .. T-1                             (d,)
    L = sum_t 1/2 E |yhat_t - x_{t+1}|^2
    W^PV = [W_12 W_13],   W^KQ = [[W_22 W_23], [W_32 W_33]],  blocks (d, d)

Matrices are complex here; a task keeps them as pairs of real arrays, {"W_KQ": (2, 2d, 2d),
"W_PV": (2, d, 2d)}, real part first: a gradient step on both is one along the conjugate gradient,
and every optimiser, solver and Hessian takes them as they are.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxformer.nn.linear_self_attention import causal_linear_self_attention
from jaxformer.parallel.sharding import constrain
from jaxformer.recipe import Batch, ConfigError, Extra, LossOutput, Mean, Params

Array = jax.Array

# The layer (section 3).


def embedding(x: Array) -> Array:
    """The sequence x (..., d, T) as E (..., 2d, T): e_t = (x_t ; x_{t-1})."""
    check_sequence("x", x)
    before = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(1, 0)])[..., :-1]
    return jnp.concatenate([x, before], axis=-2)


def predict(w_kq: Array, w_pv: Array, E: Array) -> Array:
    """yhat_t, t = 2 .. T-1, as columns (..., d, T-2), from E (..., 2d, T)."""
    for name, value in {"W_KQ": w_kq, "W_PV": w_pv}.items():
        check_complex(name, value)
    check_sequence("E", E)
    T = E.shape[-1]
    # The first column has no pair before it, and is dropped: its divisor is 1 only to be finite.
    rho = jnp.maximum(jnp.arange(T - 1), 1)
    return causal_linear_self_attention(E[..., :-1], w_pv, w_kq, rho)[..., 1:]


def mesa_optimizer(product: float | Array, x: Array) -> Array:
    """The same columns by one step of gradient descent on the OLS problem (Corollary 4.1).

    W_hat_t = product / (t - 1) sum_{i<t} x_{i+1} x_i^* is the step from W = 0 on
    1/2 sum_{i<t} |x_{i+1} - W x_i|^2, and yhat_t = W_hat_t x_t.
    """
    check_sequence("x", x)
    T = x.shape[-1]
    with jax.default_matmul_precision("highest"):
        pairs = jnp.einsum("...di,...ei->...dei", x[..., 1:-1], jnp.conj(x[..., :-2]))
        moment = jnp.cumsum(pairs, axis=-1)  # of t = 2 .. T-1
        answer = jnp.einsum("...det,...et->...dt", moment, x[..., 1:-1])
    return product * answer / jnp.arange(1, T - 1)


def sequence_loss(yhat: Array, x: Array) -> Array:
    """sum_t 1/2 |yhat_t - x_{t+1}|^2 (...)."""
    error = yhat - x[..., 2:]
    return 0.5 * jnp.sum(error.real**2 + error.imag**2, axis=(-2, -1))


# What gradient flow does from the diagonal start (Assumption 3.1, Theorem 4.1).


class Moments(NamedTuple):
    """Of x_1: E x_j^2, E x_j^4, E x_j^6 and sum_{r != j} E x_j^2 x_r^4, the same for every j."""

    second: float
    kappa_1: float
    kappa_2: float
    kappa_3: float


def moments(start: str, d: int, scale: float = 1.0) -> Moments:
    """The moments of a start of `jaxformer.data.sources.rotations`.

    "full_one" is outside of Assumption 4.1; with these it gives the limit of diagonal matrices.
    """
    s = scale
    laws = {
        "full_one": Moments(1, 1, 1, d - 1),
        "gaussian": Moments(s**2, 3 * s**4, 15 * s**6, 3 * (d - 1) * s**6),
        "sparse": Moments(s**2 / d, s**4 / d, s**6 / d, 0),
    }
    if start not in laws:
        raise ConfigError(f"start: {start!r} is unknown; allowed: {', '.join(laws)}")
    return laws[start]


def harmonic_mean_length(T: int) -> float:
    """1/(T-2) sum_{t=2}^{T-1} 1/(t-1)."""
    return sum(1 / k for k in range(1, T - 1)) / (T - 2)


def limit_product(of: Moments, T: int) -> float:
    """The product a b at the end of the flow: kappa_1 / (kappa_2 + kappa_3 / (T-2) sum 1/(t-1))."""
    return of.kappa_1 / (of.kappa_2 + of.kappa_3 * harmonic_mean_length(T))


def limit(of: Moments, T: int, a: float, b: float) -> tuple[Array, Array]:
    """(a, b) at the end of the flow from (a, b): that product, and a^2 - b^2 as it was."""
    product, difference = limit_product(of, T), a**2 - b**2
    end = jnp.sqrt((difference + jnp.sqrt(difference**2 + 4 * product**2)) / 2)
    return end, product / end


def diagonal_loss(product: Array, of: Moments, T: int, d: int) -> Array:
    """L of W_32 = a I, W_12 = b I, which depends on their product alone."""
    c, H = product, harmonic_mean_length(T)
    curved = of.kappa_2 + of.kappa_3 * H
    return (T - 2) * d / 2 * (c**2 * curved - 2 * c * of.kappa_1 + of.second)


def diagonal_flow(a: Array, b: Array, of: Moments, T: int, d: int) -> tuple[Array, Array]:
    """(da/dt, db/dt) in the flow of all entries; each of the d on a diagonal moves alike."""
    slope = jax.grad(lambda c: diagonal_loss(c, of, T, d))(a * b) / d
    return -b * slope, -a * slope


def diagonal(a: Array | float, b: Array | float, d: int) -> Params:
    """W_32 = a I, W_12 = b I, all other blocks 0, as parameters."""
    eye = jnp.eye(d)
    w_kq = jnp.zeros((2, 2 * d, 2 * d)).at[0, d:, :d].set(a * eye)
    return {"W_KQ": w_kq, "W_PV": jnp.zeros((2, d, 2 * d)).at[0, :, :d].set(b * eye)}


def complex_matrices(params: Params) -> tuple[Array, Array]:
    """(W^KQ, W^PV) of real pairs."""
    w_kq, w_pv = (jax.lax.complex(*params[name]) for name in ("W_KQ", "W_PV"))
    return w_kq, w_pv


def blocks(params: Params) -> tuple[Array, Array]:
    """(W_32, W_12), the two blocks that move, complex (d, d)."""
    w_kq, w_pv = complex_matrices(params)
    d = len(w_pv)
    return w_kq[d:, :d], w_pv[:, :d]


def product(params: Params) -> Array:
    """The product a b: the mean over j of Re W_32[j, j] Re W_12[j, j]."""
    w_32, w_12 = blocks(params)
    return jnp.mean(jnp.diagonal(w_32).real * jnp.diagonal(w_12).real)


def off_diagonal(params: Params) -> Array:
    """The mean modulus of the off-diagonal entries of W_32."""
    w_32, _ = blocks(params)
    d = len(w_32)
    return jnp.sum(jnp.abs(w_32) * (1 - jnp.eye(d))) / max(d * (d - 1), 1)


def without_off_diagonals(params: Params) -> Params:
    """`params` with W_32 and W_12 made diagonal."""
    d = params["W_PV"].shape[1]
    eye = jnp.eye(d)
    w_32, w_12 = params["W_KQ"][:, d:, :d], params["W_PV"][:, :, :d]
    return {
        "W_KQ": params["W_KQ"].at[:, d:, :d].set(w_32 * eye),
        "W_PV": params["W_PV"].at[:, :, :d].set(w_12 * eye),
    }


# The task.


@dataclasses.dataclass(frozen=True)
class Autoregression:
    """L on batches {"x": (B, d, T) complex}, from W_32 = a I, W_12 = b I."""

    a: float
    b: float

    def __post_init__(self) -> None:
        for name, value in {"a": self.a, "b": self.b}.items():
            if not isinstance(value, jax.core.Tracer) and not value > 0:
                raise ConfigError(f"{name}: {value}; give a positive number")

    def init(self, key: Array, batch: Batch) -> tuple[Params, Extra]:
        del key
        return diagonal(self.a, self.b, batch["x"].shape[-2]), {}

    def loss(
        self, params: Params, extra: Extra, batch: Batch, *, key: Array, train: bool
    ) -> LossOutput:
        yhat = self.predict(params, extra, batch, key=key)
        loss = Mean.of(sequence_loss(yhat, batch["x"]), batch.get("weight"))
        metrics = {"loss": loss, "product": Mean.of(product(params))}
        return LossOutput(loss.value(), loss.weight, metrics, extra)

    def predict(self, params: Params, extra: Extra, batch: Batch, *, key: Array) -> Array:
        """The answers yhat (B, d, T-2), to be compared with x_3 .. x_T."""
        axes = ("batch", None, None)
        E = constrain(embedding(constrain(batch["x"], axes)), axes)
        return constrain(predict(*complex_matrices(params), E), axes)


@dataclasses.dataclass(frozen=True, eq=False)
class Population:
    """The same loss of a law without a batch: its mean over weighted `sequences`.

    Those of `jaxformer.data.sources.rotations.quadrature` make it exact.
    """

    task: Autoregression
    sequences: Batch

    def init(self, key: Array, batch: Batch) -> tuple[Params, Extra]:
        del batch
        return self.task.init(key, self.sequences)

    def loss(
        self, params: Params, extra: Extra, batch: Batch, *, key: Array, train: bool
    ) -> LossOutput:
        del batch
        value = self.population(params)
        metrics = {"loss": Mean.of(value), "product": Mean.of(product(params))}
        return LossOutput(value, jnp.ones(()), metrics, extra)

    def population(self, params: Params) -> Array:
        """The loss alone, in the precision of the sequences."""
        x, weight = self.sequences["x"], self.sequences["weight"]
        yhat = predict(*complex_matrices(params), embedding(x))
        return jnp.vdot(weight, sequence_loss(yhat, x)) / weight.sum()


def check_complex(name: str, value: Array) -> None:
    if not jnp.issubdtype(value.dtype, jnp.complexfloating):
        raise ConfigError(f"{name}: {value.dtype}; give a complex array")


def check_sequence(name: str, value: Array) -> None:
    check_complex(name, value)
    if value.shape[-1] < 3:
        raise ConfigError(f"{name}: T={value.shape[-1]} steps; give at least 3")
