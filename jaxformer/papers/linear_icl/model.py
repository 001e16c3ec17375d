"""One linear self-attention layer that learns regression in context (arXiv 2306.09927).

    E = [[x_1 .. x_N, x_q], [y_1 .. y_N, 0]]                              (d+1, N+1)
    f(E) = E + W^PV E (E^T W^KQ E) / N,    yhat_q = f(E)[d+1, N+1]
    Gamma = (1 + 1/N) Lambda + tr(Lambda)/N I,    x ~ N(0, Lambda), w ~ N(0, I)

Parameters are {"W_KQ": (d+1, d+1), "W_PV": (d+1, d+1)}. N is the length of training prompts, M of
a test prompt; Gamma belongs to training. Everything takes the dtype it is given.
"""

from __future__ import annotations

import dataclasses
import warnings
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxformer.data.sources.regression import check_covariance
from jaxformer.nn.linear_self_attention import linear_self_attention
from jaxformer.recipe import Batch, ConfigError, Extra, LossOutput, Mean, Params

Array = jax.Array

# The layer (section 3.2).


def embedding(x: Array, y: Array, x_q: Array) -> Array:
    """The prompt x (..., N, d), y (..., N), x_q (..., d) as E (..., d+1, N+1)."""
    examples = jnp.concatenate([x, y[..., None]], axis=-1)
    query = jnp.concatenate([x_q, jnp.zeros_like(x_q[..., :1])], axis=-1)
    return jnp.concatenate([examples, query[..., None, :]], axis=-2).mT


def layer(params: Params, E: Array) -> Array:
    """f(E), (..., d+1, N+1). The label of the query must be 0; checked outside of jit."""
    if not isinstance(E, jax.core.Tracer) and np.any(np.asarray(E)[..., -1, -1] != 0):
        raise ConfigError("E: the last label, that of the query, must be 0; use embedding()")
    N = E.shape[-1] - 1
    return E + linear_self_attention(E, params["W_PV"], params["W_KQ"], rho=N)


def predict(params: Params, x: Array, y: Array, x_q: Array) -> Array:
    """yhat_q (...): the one entry of f(E) that is read, without the rest of it."""
    E = embedding(x, y, x_q)
    d, M = x.shape[-1], x.shape[-2]
    with jax.default_matmul_precision("highest"):
        value = jnp.einsum("i,...il->...l", params["W_PV"][d], E)
        key = jnp.einsum("...il,...i->...l", E, x_q @ params["W_KQ"][:, :d].T)
        return jnp.einsum("...l,...l->...", value, key) / M


# Where gradient flow starts and ends (Assumption 3.3, Theorem 4.1).


def gamma(Lambda: Array, N: int) -> Array:
    """Gamma (d, d) = (1 + 1/N) Lambda + tr(Lambda)/N I."""
    check_examples(N)
    return (1 + 1 / N) * Lambda + jnp.trace(Lambda) / N * jnp.eye(len(Lambda), dtype=Lambda.dtype)


def initial_parameters(Theta: Array, sigma: float, Lambda: Array | np.ndarray, N: int) -> Params:
    """W^KQ = sigma diag(Theta Theta^T, 0), W^PV = sigma diag(0, 1), for ||Theta Theta^T||_F = 1.

    Lambda is a known array; Theta may be traced, and is then not checked. Warns when
    sigma^2 ||Gamma||_op sqrt(d) >= 2: the theorem then promises nothing.
    """
    check_examples(N)
    check_covariance(Lambda)
    square = Theta @ Theta.T
    if not isinstance(square, jax.core.Tracer):
        norm = np.linalg.norm(square)
        if not np.isclose(norm, 1.0, rtol=1e-4):
            raise ConfigError(f"Theta: ||Theta Theta^T||_F is {norm:.6g}; divide Theta by its root")
        if not np.any(Theta @ Lambda):
            raise ConfigError("Theta: Theta Lambda is 0, where the flow never moves; take another")
    if sigma <= 0:
        raise ConfigError(f"sigma: {sigma}; give a positive number")
    largest = (1 + 1 / N) * np.linalg.eigvalsh(Lambda)[-1] + np.trace(Lambda) / N  # ||Gamma||_op
    if (size := sigma**2 * largest * len(Lambda) ** 0.5) >= 2:
        warnings.warn(
            f"sigma: {sigma} gives sigma^2 ||Gamma||_op sqrt(d) = {size:.3g}; convergence is "
            "proven below 2 only",
            stacklevel=2,
        )
    U = jnp.asarray(sigma * square)
    return weights(U, jnp.asarray(sigma, U.dtype))


def limit(Lambda: Array, N: int) -> Params:
    """The global minimiser that gradient flow reaches from `initial_parameters` (Theorem 4.1)."""
    return balanced_weights(jnp.linalg.inv(gamma(Lambda, N)))


def random_covariance_limit(lambdas: Array, N: int) -> Array:
    """The diagonal (d,) of B for prompts with covariance diag(lambdas[tau]) (Theorem 4.5).

    B = E[Gamma_tau Lambda_tau^2]^{-1} E[Lambda_tau^2], the mean taken over the rows of `lambdas`
    (T, d). The limit is `balanced_weights(jnp.diag(B))`.
    """
    gammas = (1 + 1 / N) * lambdas + lambdas.sum(-1, keepdims=True) / N
    return jnp.mean(lambdas**2, 0) / jnp.mean(gammas * lambdas**2, 0)


def balanced_weights(product: Array) -> Params:
    """The parameters with u U = `product` (d, d) and u = ||U||_F > 0, as the flow keeps them."""
    u = jnp.sqrt(jnp.linalg.norm(product))
    return weights(product / u, u)


def weights(U: Array, u: Array) -> Params:
    """W^KQ = diag(U, 0), W^PV = diag(0, u)."""
    d = len(U)
    zero = jnp.zeros((d + 1, d + 1), U.dtype)
    return {"W_KQ": zero.at[:d, :d].set(U), "W_PV": zero.at[d, d].set(u)}


@dataclasses.dataclass(frozen=True, eq=False)
class InContextRegression:
    """The task: all of both matrices, from Assumption 3.3 with a random Theta.

    Batches are those of `jaxformer.data.sources.regression.Prompts`.
    """

    Lambda: np.ndarray  # (d, d)
    N: int
    sigma: float

    def init(self, key: Array, batch: Batch) -> tuple[Params, Extra]:
        del batch
        Theta = jax.random.normal(key, np.shape(self.Lambda))
        Theta /= jnp.sqrt(jnp.linalg.norm(Theta @ Theta.T))
        return initial_parameters(Theta, self.sigma, self.Lambda, self.N), {}

    def loss(
        self, params: Params, extra: Extra, batch: Batch, *, key: Array, train: bool
    ) -> LossOutput:
        """1/2 (yhat_q - y_q)^2, the mean over prompts."""
        error = self.predict(params, extra, batch, key=key) - batch["y_q"]
        loss = Mean.of(0.5 * error**2, batch.get("weight"))
        return LossOutput(loss.value(), loss.weight, {"loss": loss}, extra)

    def predict(self, params: Params, extra: Extra, batch: Batch, *, key: Array) -> Array:
        return predict(params, batch["x"], batch["y"], batch["x_q"])


# The flow on the two blocks that move (section 5).


def reduced_loss(U: Array, u: Array, Lambda: Array, N: int) -> Array:
    """The population loss 1/2 E (yhat_q - <w, x_q>)^2 of `weights(U, u)`."""
    G = gamma(Lambda, N)
    quadratic = 0.5 * u**2 * jnp.trace(G @ Lambda @ U @ Lambda @ U.T)
    return quadratic - u * jnp.trace(Lambda @ Lambda @ U.T) + 0.5 * jnp.trace(Lambda)


def reduced_flow(U: Array, u: Array, Lambda: Array, N: int) -> tuple[Array, Array]:
    """(dU/dt, du/dt), minus the gradient of `reduced_loss`; u^2 - ||U||_F^2 is conserved."""
    G, square = gamma(Lambda, N), Lambda @ Lambda
    dU = -(u**2) * G @ Lambda @ U @ Lambda + u * square
    du = -jnp.trace(u * G @ Lambda @ U @ Lambda @ U.T - square @ U.T)
    return dU, du


def minimum_loss(Lambda: Array, N: int) -> Array:
    """The least population loss, tr(Lambda)/2 - tr(Lambda^2 Gamma^{-1})/2, at u U = Gamma^{-1}."""
    return 0.5 * (
        jnp.trace(Lambda) - jnp.trace(jnp.linalg.solve(gamma(Lambda, N), Lambda @ Lambda))
    )


# The risk of the limit on new prompts (Theorem 4.2).


class LabelLaw(NamedTuple):
    """What the risk needs to know of the law of (x, y), x ~ N(0, Lambda)."""

    a: Array  # (d,), Lambda^{-1} E[x y], the best linear predictor
    Sigma: Array  # (d, d), Cov(x y)
    best: Array  # min_w E (<w, x> - y)^2


def linear_label_law(w: Array, Lambda: Array, noise: float = 0.0) -> LabelLaw:
    """The law of y = <w, x> + noise * N(0, 1)."""
    Lw = Lambda @ w
    Sigma = jnp.outer(Lw, Lw) + (w @ Lw + noise**2) * Lambda
    return LabelLaw(w, Sigma, jnp.asarray(noise**2, Lambda.dtype))


def risk(labels: LabelLaw, Lambda: Array, N: int, M: int) -> Array:
    """E (yhat_q - y_q)^2 over test prompts of M examples and their query, all with that law."""
    inverse = jnp.linalg.inv(gamma(Lambda, N))
    bias = inverse @ Lambda + jnp.trace(Lambda) * inverse  # N (I - Gamma^{-1} Lambda) = bias
    residual = bias @ labels.a
    return (
        labels.best
        + jnp.trace(labels.Sigma @ inverse @ inverse @ Lambda) / M
        + residual @ Lambda @ residual / N**2
    )


def mean_risk(Lambda: Array, N: int, M: int) -> Array:
    """`risk` of noiseless linear labels, averaged over w ~ N(0, I); 2 `minimum_loss` at M = N."""
    inverse = jnp.linalg.inv(gamma(Lambda, N))
    square, trace = inverse @ inverse, jnp.trace(Lambda)
    t1, t2, t3 = (jnp.trace(square @ jnp.linalg.matrix_power(Lambda, k)) for k in (1, 2, 3))
    return (t3 + trace * t2) / M + (t3 + 2 * trace * t2 + trace**2 * t1) / N**2


def check_examples(N: int) -> None:
    if N < 1:
        raise ConfigError(f"N: {N} examples per prompt; give at least 1")
