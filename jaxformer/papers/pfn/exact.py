"""Exact Gaussian-process inference in float64: what a PFN of such a prior is measured against.

NumPy on the host, so that the precision does not hang on a flag of JAX. Leading axes of x
(..., n, F), y (..., n), x_q (..., m, F) and y_q (..., m) are data sets.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import scipy.optimize
import scipy.special
import scipy.stats
from numpy.typing import ArrayLike

from jaxformer.papers.pfn.priors import GP, HyperGP


def gram(gp: GP, a: ArrayLike, b: ArrayLike) -> np.ndarray:
    """Covariance (..., n, m) of the noise-free function."""
    a, b = (_float64(x) / _float64(gp.lengthscale) for x in (a, b))
    d2 = np.square(a[..., :, None, :] - b[..., None, :, :]).sum(-1)
    return _float64(gp.outputscale) * gp.shape(d2, np)


def predict(gp: GP, x: ArrayLike, y: ArrayLike, x_q: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance (..., m) of noisy values at x_q given the rows (x, y); none will do."""
    factor, y, k = _factor(gp, x), _float64(y), gram(gp, x, x_q)
    solved = np.linalg.solve(factor, k)
    mean = np.squeeze(np.swapaxes(solved, -1, -2) @ np.linalg.solve(factor, y[..., None]), -1)
    prior = _float64(gp.outputscale) + _float64(gp.noise_variance)
    return mean, prior - np.square(solved).sum(-2)


def nll(gp: GP, x: ArrayLike, y: ArrayLike, x_q: ArrayLike, y_q: ArrayLike) -> np.ndarray:
    """Negative log density (..., m) of y_q at x_q, each by itself."""
    mean, variance = predict(gp, x, y, x_q)
    return gaussian_nll(_float64(y_q), mean, variance)


def gaussian_nll(y: np.ndarray, mean: ArrayLike, variance: ArrayLike) -> np.ndarray:
    return 0.5 * (np.log(2 * np.pi * variance) + np.square(y - mean) / variance)


def log_evidence(gp: GP, x: ArrayLike, y: ArrayLike) -> np.ndarray:
    """Log marginal likelihood (...) of the rows."""
    factor, y = _factor(gp, x), _float64(y)
    white = np.linalg.solve(factor, y[..., None])[..., 0]
    log_determinant = np.log(np.diagonal(factor, axis1=-2, axis2=-1)).sum(-1)
    return -0.5 * np.square(white).sum(-1) - log_determinant - y.shape[-1] / 2 * np.log(2 * np.pi)


def averaged_nll(
    gps: Sequence[GP], x: ArrayLike, y: ArrayLike, x_q: ArrayLike, y_q: ArrayLike
) -> np.ndarray:
    """`nll` with the hyperparameters averaged over draws of their prior, weighed by evidence."""
    evidence = np.stack([log_evidence(gp, x, y) for gp in gps])
    weight = evidence - scipy.special.logsumexp(evidence, 0)
    each = np.stack([-nll(gp, x, y, x_q, y_q) for gp in gps])
    return -scipy.special.logsumexp(weight[..., None] + each, 0)


def fit(hyper: HyperGP, x: ArrayLike, y: ArrayLike) -> GP:
    """The most probable hyperparameters of one data set (MLE-II), by L-BFGS from the prior means.

    The search is over the logarithms of the hyperparameters; their density is that of the prior.
    """
    a, rate = np.array(hyper.laws).T

    def objective(logs: np.ndarray) -> float:
        numbers = np.exp(logs)
        prior = scipy.stats.gamma.logpdf(numbers, a, scale=1 / rate).sum()
        return -float(log_evidence(hyper.gp(numbers), x, y) + prior)

    low = np.log([1e-4, hyper.noise_floor, *[1e-3] * hyper.features])
    bounds = [(at_least, np.log(1e3)) for at_least in low]
    start = np.maximum(np.log(a / rate), low)
    found = scipy.optimize.minimize(objective, start, method="L-BFGS-B", bounds=bounds)
    return hyper.gp(np.exp(found.x))


def _factor(gp: GP, x: ArrayLike) -> np.ndarray:
    """Lower Cholesky factor (..., n, n) of the covariance of noisy values at x."""
    n = np.shape(x)[-2]
    return np.linalg.cholesky(gram(gp, x, x) + _float64(gp.noise_variance) * np.eye(n))


def _float64(x: ArrayLike) -> np.ndarray:
    return np.asarray(x, np.float64)
