"""Scores of a whole test set that are no means of its batches, of scikit-learn and SciPy."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np


def f1(answer: np.ndarray, label: np.ndarray) -> float:
    """F1 of class 1 among two, from logits (N, 2); 0 where nothing of it is found."""
    from sklearn.metrics import f1_score

    return float(f1_score(label, answer.argmax(-1), zero_division=0.0))


def matthews(answer: np.ndarray, label: np.ndarray) -> float:
    """Matthews' correlation coefficient, from logits (N, C); 0 if all get the same class."""
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(label, answer.argmax(-1)))


def pearson(answer: np.ndarray, label: np.ndarray) -> float:
    """Pearson's correlation of outputs (N, 1) with scores (N,); 0 where either is constant."""
    from scipy.stats import pearsonr

    return _correlation(lambda x, y: pearsonr(x, y).statistic, answer, label)


def spearman(answer: np.ndarray, label: np.ndarray) -> float:
    """Spearman's, of ranks: equal numbers have their mean rank; 0 where either is constant."""
    from scipy.stats import spearmanr

    return _correlation(lambda x, y: spearmanr(x, y).statistic, answer, label)


def _correlation(
    of: Callable[[np.ndarray, np.ndarray], float], answer: np.ndarray, label: np.ndarray
) -> float:
    x, y = answer[:, 0].astype(np.float64), label.astype(np.float64)
    return 0.0 if np.ptp(x) == 0 or np.ptp(y) == 0 else float(of(x, y))


SCORES: Mapping[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "f1": f1,
    "matthews": matthews,
    "pearson": pearson,
    "spearman": spearman,
}


@dataclasses.dataclass(frozen=True)
class Scores:
    """Those of `SCORES` with these names, of answers and "label": `MeanEvaluator.whole`."""

    names: tuple[str, ...]
    columns: tuple[str, ...] = ("label",)

    def __call__(self, rows: Mapping[str, np.ndarray]) -> dict[str, float]:
        return {name: SCORES[name](rows["answer"], rows["label"]) for name in self.names}
