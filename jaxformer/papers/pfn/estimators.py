"""A trained PFN as a scikit-learn estimator: `fit` stores the context, `predict` is one pass."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from numpy.typing import ArrayLike
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.utils.validation import check_array, check_is_fitted, check_X_y

from jaxformer.nn.bar_distribution import BarDistribution
from jaxformer.papers.pfn.criteria import Bars, Binary, Categorical
from jaxformer.papers.pfn.model import answer, input_features, read_context
from jaxformer.papers.pfn.recipe import build
from jaxformer.papers.pfn.task import PFNTask
from jaxformer.recipe import Extra, Params
from jaxformer.train.checkpoint import Checkpoints, saved_steps
from jaxformer.train.states import restore_averaged

ROWS = 64  # contexts and queries are padded to multiples of this, so that few sizes are compiled


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Pretrained:
    """A task with its trained parameters: what an estimator is made from."""

    task: PFNTask
    params: Params
    extra: Extra

    def __repr__(self) -> str:
        criterion = type(self.task.criterion).__name__
        return f"Pretrained({criterion}, {input_features(self.params)} features)"

    @classmethod
    def from_run(cls, workdir: str | Path, step: int | None = None) -> Self:
        """The newest checkpoint of a run, or that of `step`.

        Raises:
            ConfigError: no such checkpoint.
        """
        steps = saved_steps(workdir)
        with Checkpoints(workdir) as checkpoints:
            config = ConfigDict(checkpoints.meta(steps[-1] if step is None else step)["config"])
        recipe = build(config)
        _, state = restore_averaged(recipe, workdir, step=step)
        # Off the mesh of the run: an estimator needs one device.
        params, extra = jax.device_put(jax.device_get((state.params, dict(state.extra))))
        return cls(recipe.task, params, extra)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Itself, because nothing of it changes: scikit-learn's `clone` copies all parameters."""
        return self


class _PFN(BaseEstimator):
    """What both estimators share: the context, prepared as the prior prepares its data sets."""

    def __init__(
        self, pretrained: Pretrained, *, standardize: bool = True, rescale: bool = False
    ) -> None:
        self.pretrained = pretrained
        self.standardize = standardize
        self.rescale = rescale

    def _fit(self, X: np.ndarray, y: np.ndarray) -> None:
        """Keep the context's keys and values; y as the model reads it."""
        features = input_features(self.pretrained.params)
        if X.shape[1] > features:
            raise ValueError(
                f"X: {X.shape[1]} features, but the model was trained with at most {features}; "
                "select features or train with more (data.arguments.features)"
            )
        self.n_features_in_ = X.shape[1]
        self.mean_, self.scale_ = 0.0, 1.0
        if self.standardize and len(X) > 1:
            self.mean_, self.scale_ = X.mean(0), X.std(0, ddof=1) + 1e-6
        self.n_ = jnp.asarray([len(X)], jnp.int32)
        rows = -(-len(X) // ROWS) * ROWS
        padded = np.zeros(rows, y.dtype)
        padded[: len(y)] = y
        self.cache_ = _read_context(
            self.pretrained.task.model,
            self.pretrained.params,
            self._prepared(X, rows),
            padded[None],
            self.n_,
        )

    def _prepared(self, X: np.ndarray, rows: int) -> np.ndarray:
        """(1, rows, F) float32: standardised by the context, padded with zeros."""
        features = input_features(self.pretrained.params)
        scale = self.scale_ * (self.n_features_in_ / features if self.rescale else 1)
        x = np.zeros((1, rows, features), np.float32)
        x[0, : len(X), : X.shape[1]] = (X - self.mean_) / scale
        return x

    def _outputs(self, X: ArrayLike) -> jax.Array:
        """(rows, n_out) for queries."""
        check_is_fitted(self, "cache_")
        X = check_array(X)
        if X.shape[1] != self.n_features_in_:
            raise ValueError(f"X: {X.shape[1]} features; fit saw {self.n_features_in_}")
        model, params = self.pretrained.task.model, self.pretrained.params
        chunks = [X[i : i + ROWS] for i in range(0, len(X), ROWS)]
        found = [
            _answer(model, params, self.cache_, self._prepared(chunk, ROWS), self.n_)[0]
            for chunk in chunks
        ]
        return jnp.concatenate(found)[: len(X)]


class PFNRegressor(RegressorMixin, _PFN):
    """Regression by a PFN whose outputs are bars.

    y is fed as it is: its scale must be that of the prior. Wrap the estimator into scikit-learn's
    `TransformedTargetRegressor` where it is not. With `standardize` the features are standardised
    by the context, which suits priors with standardised inputs; `rescale` divides them by the used
    part of the trained features, as the prior `tabular_gp` does.

    Raises:
        ValueError: (in fit) more features than the model was trained with, or NaN.
    """

    def fit(self, X: ArrayLike, y: ArrayLike) -> Self:
        if not isinstance(self.pretrained.task.criterion, Bars):
            raise ValueError("pretrained: its criterion is not bars; use PFNClassifier")
        X, y = check_X_y(X, y, y_numeric=True)
        self._fit(X, y.astype(np.float32))
        return self

    def predict_dist(self, X: ArrayLike) -> tuple[BarDistribution, jax.Array]:
        """The distribution and the logits (rows, J) that its methods take."""
        bars = self.pretrained.task.criterion.distribution(self.pretrained.extra)
        return bars, self._outputs(X)

    def predict(self, X: ArrayLike, return_std: bool = False) -> Any:
        """The predictive mean (rows,), and the standard deviation if asked for."""
        bars, logits = self.predict_dist(X)
        mean = np.asarray(bars.mean(logits))
        return (mean, np.sqrt(bars.variance(logits))) if return_std else mean

    def quantiles(self, X: ArrayLike, q: ArrayLike = (0.1, 0.5, 0.9)) -> np.ndarray:
        """The predictive quantiles (rows, len(q))."""
        bars, logits = self.predict_dist(X)
        return np.asarray(bars.icdf(logits[:, None], jnp.asarray(q)))


class PFNClassifier(ClassifierMixin, _PFN):
    """Classification by a PFN whose outputs are logits of two or more classes.

    See `PFNRegressor` for `standardize` and `rescale`.

    Raises:
        ValueError: (in fit) more features or classes than the model was trained with, or NaN.
    """

    def fit(self, X: ArrayLike, y: ArrayLike) -> Self:
        criterion = self.pretrained.task.criterion
        if not isinstance(criterion, Binary | Categorical):
            raise ValueError("pretrained: its criterion has no classes; use PFNRegressor")
        X, y = check_X_y(X, y)
        self.classes_, labels = np.unique(y, return_inverse=True)
        most = 2 if isinstance(criterion, Binary) else criterion.outputs
        if not 2 <= len(self.classes_) <= most:
            raise ValueError(f"y: {len(self.classes_)} classes; the model tells from 2 to {most}")
        dtype = np.float32 if isinstance(criterion, Binary) else np.int32
        self._fit(X, labels.astype(dtype))
        return self

    def predict_proba(self, X: ArrayLike) -> np.ndarray:
        """(rows, classes), in the order of `classes_`."""
        output = self._outputs(X)
        if isinstance(self.pretrained.task.criterion, Binary):
            output = jnp.concatenate([jnp.zeros_like(output), output], -1)
        return np.asarray(jax.nn.softmax(output[:, : len(self.classes_)]))

    def predict(self, X: ArrayLike) -> np.ndarray:
        return self.classes_[self.predict_proba(X).argmax(-1)]


@functools.partial(jax.jit, static_argnums=0)
def _read_context(model: Any, params: Params, x: jax.Array, y: jax.Array, n: jax.Array) -> Any:
    return read_context(model, params, x, y, n, ROWS)


_answer = jax.jit(answer, static_argnums=0)
