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


def random_start(key: Array, sigma: float, Lambda: np.ndarray, N: int) -> Params:
    """`initial_parameters` with a Gaussian Theta, brought to its norm."""
    Theta = jax.random.normal(key, np.shape(Lambda))
    Theta /= jnp.sqrt(jnp.linalg.norm(Theta @ Theta.T))
    return initial_parameters(Theta, sigma, Lambda, N)


def limit(Lambda: Array, N: int) -> Params:
    """The global minimiser that gradient flow reaches from `initial_parameters` (Theorem 4.1)."""
    return balanced_weights(jnp.linalg.inv(gamma(Lambda, N)))


def random_covariance_limit(covariances: Array, N: int) -> Array:
    """B (d, d), what u U tends to when each prompt draws its covariance (Theorem 4.5).

    B = E[Gamma_tau Lambda_tau^2]^{-1} E[Lambda_tau^2], the mean taken over `covariances`
    (T, d, d), which the theorem takes to be diagonal; of a single one it is Gamma^{-1}. The limit
    is `balanced_weights(B)`.
    """
    squares = covariances @ covariances
    gammas = jax.vmap(gamma, (0, None))(covariances, N)
    return jnp.linalg.solve((gammas @ squares).mean(0), squares.mean(0))


def balanced_weights(product: Array) -> Params:
    """The parameters with u U = `product` (d, d) and u = ||U||_F > 0, as the flow keeps them."""
    u = jnp.sqrt(jnp.linalg.norm(product))
    return weights(product / u, u)


def weights(U: Array, u: Array) -> Params:
    """W^KQ = diag(U, 0), W^PV = diag(0, u)."""
    d = len(U)
    zero = jnp.zeros((d + 1, d + 1), U.dtype)
    return {"W_KQ": zero.at[:d, :d].set(U), "W_PV": zero.at[d, d].set(u)}


def blocks(params: Params) -> tuple[Array, Array, Array]:
    """(U, u, |w21|): the two blocks that move from such a start, and the norm of w21 of both."""
    w_kq, w_pv = params["W_KQ"], params["W_PV"]
    d = len(w_kq) - 1
    outside = jnp.stack([w_kq[d, :d], w_pv[d, :d]])
    return w_kq[:d, :d], w_pv[d, d], jnp.linalg.norm(outside)


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


# The population loss.


def population_loss(params: Params, Lambda: Array, N: int) -> Array:
    """1/2 E (yhat_q - <w, x_q>)^2 over prompts of N examples, for any two matrices, exactly.

    Neither Lambda nor N need be those of training. With p, b the last row of W^PV, K, k the first
    d columns of W^KQ, a = p + b w, A = K + w k^T and X = sum_i x_i x_i^T,

        yhat_q = x_q^T A^T X a / N + <p, x_q> x_q^T K x_q / N,

    whose square has moments by Isserlis in x_q and w, and by Wishart in X: with H = A Lambda A^T,
    E X H X = N^2 Lambda H Lambda + N (Lambda H Lambda + tr(H Lambda) Lambda).
    """
    check_examples(N)
    d, L = len(Lambda), Lambda
    p, b = params["W_PV"][d, :d], params["W_PV"][d, d]
    K, k = params["W_KQ"][:d, :d], params["W_KQ"][d, :d]
    t, L2 = jnp.trace(L), L @ L
    t4 = t**2 + 2 * jnp.trace(L2)  # E <w, Lambda w>^2
    pLp, kLk, KLK, q = p @ L @ p, k @ L @ k, K @ L @ K.T, K.T @ L @ p

    # The examples: E |A^T L a|_L^2, E tr(H L) |a|_L^2 and E <w, L A^T L a>, a and A affine in w.
    even = q @ L @ q + 2 * b * t * (k @ L @ q) + b**2 * t4 * kLk
    odd = b**2 * jnp.trace(L2 @ KLK) + 2 * b * (k @ L @ K.T @ L2 @ p) + (p @ L2 @ p) * kLk
    spread = jnp.trace(KLK @ L) * (pLp + b**2 * t) + kLk * (pLp * t + b**2 * t4)
    spread += 4 * b * (p @ L2 @ K @ L @ k)
    answer = b * jnp.trace(L2 @ K) + k @ L2 @ p

    # The query's own column: T = <p, x_q> x_q^T K x_q, with E T^2 and E T <x_q, A^T L a - w>.
    S = 0.5 * (K + K.T) @ L
    s, LSp = jnp.trace(S), L @ S @ p
    square = pLp * (s**2 + 2 * jnp.trace(S @ S)) + 4 * s * (p @ LSp) + 8 * (S @ p) @ LSp
    cross = (s * (L @ p) + 2 * LSp) @ (q + b * t * k)

    examples = (1 + 1 / N) * (even + odd) + spread / N - 2 * answer + t
    return 0.5 * (examples + 2 * cross / N + square / N**2)


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


def quadratic_label_law(w: Array, Lambda: Array, c: float) -> LabelLaw:
    """The law of y = <w, x> + c (x_1^2 - 1), its moments by Isserlis."""
    variance, first = Lambda[0, 0], jnp.outer(Lambda[0], Lambda[0])
    second = variance * Lambda + 2 * first  # E[x x^T x_1^2]
    fourth = 3 * variance**2 * Lambda + 12 * variance * first  # E[x x^T x_1^4]
    Sigma = linear_label_law(w, Lambda).Sigma + c**2 * (fourth - 2 * second + Lambda)
    return LabelLaw(w, Sigma, c**2 * (3 * variance**2 - 2 * variance + 1))


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


# The two ways to train it: on prompts as they are drawn, or on all of them at once.


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
        return random_start(key, self.sigma, self.Lambda, self.N), {}

    def loss(
        self, params: Params, extra: Extra, batch: Batch, *, key: Array, train: bool
    ) -> LossOutput:
        """1/2 (yhat_q - y_q)^2, the mean over prompts."""
        error = self.predict(params, extra, batch, key=key) - batch["y_q"]
        weight = batch.get("weight")
        loss = Mean.of(0.5 * error**2, weight)
        metrics = {"loss": loss, "relative_error": relative_error(error, batch["y_q"], weight)}
        return LossOutput(loss.value(), loss.weight, metrics, extra)

    def predict(self, params: Params, extra: Extra, batch: Batch, *, key: Array) -> Array:
        """yhat_q (B,)."""
        return predict(params, batch["x"], batch["y"], batch["x_q"])


@dataclasses.dataclass(frozen=True, eq=False)
class PopulationRegression:
    """The task without a batch: `population_loss`, the mean over `covariances` (T, d, d).

    Starts like `InContextRegression` for the mean covariance. With several diagonal covariances
    it is that of section 4.3, for the law that draws one of them.
    """

    covariances: np.ndarray
    N: int
    sigma: float

    def init(self, key: Array, batch: Batch) -> tuple[Params, Extra]:
        del batch
        return random_start(key, self.sigma, self.covariances.mean(0), self.N), {}

    def loss(
        self, params: Params, extra: Extra, batch: Batch, *, key: Array, train: bool
    ) -> LossOutput:
        loss = Mean.of(self.population(params))
        return LossOutput(loss.value(), loss.weight, {"loss": loss}, extra)

    def population(self, params: Params) -> Array:
        """The loss alone."""
        each = jax.vmap(population_loss, (None, 0, None))
        return each(params, jnp.asarray(self.covariances), self.N).mean()

    def limit(self) -> Params:
        """Where its gradient flow ends."""
        return balanced_weights(random_covariance_limit(jnp.asarray(self.covariances), self.N))


def relative_error(error: Array, y: Array, weight: Array | None = None) -> Mean:
    """E error^2 / E y^2: 1 for the answer 0."""
    return Mean(Mean.of(error**2, weight).total, Mean.of(y**2, weight).total)


def check_examples(N: int) -> None:
    if N < 1:
        raise ConfigError(f"N: {N} examples per prompt; give at least 1")
