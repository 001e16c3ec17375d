"""How well the embeddings of two films of the same happening tell its moments.

Metrics of Sermanet et al. 2018 (arXiv 1704.06888) and Dwibedi et al. 2019 (arXiv 1904.07846).
"""

from __future__ import annotations

import numpy as np


def nearest(z1: np.ndarray, z2: np.ndarray) -> np.ndarray:
    """(l,) for each row of z1 (l, D) the row of z2 (m, D) nearest to it, the first of equals."""
    distances = np.square(z1[:, None].astype(np.float64) - z2[None]).sum(-1)
    return distances.argmin(1)


def alignment_error(z1: np.ndarray, z2: np.ndarray) -> float:
    """Mean distance in time of the nearest row, as a fraction of the length."""
    return float(np.abs(np.arange(len(z1)) - nearest(z1, z2)).mean() / len(z1))


def cycle_error(z1: np.ndarray, z2: np.ndarray) -> float:
    """The same of the way to the other film and back."""
    back = nearest(z2, z1)[nearest(z1, z2)]
    return float(np.abs(np.arange(len(z1)) - back).mean() / len(z1))


def kendalls_tau(z1: np.ndarray, z2: np.ndarray) -> float:
    """Pairs of moments that the nearest rows have in the same order, less the others, over all.

    Two moments with the same nearest row are out of order.
    """
    found = nearest(z1, z2)
    i, j = np.triu_indices(len(found), 1)
    return float(2 * (found[i] < found[j]).mean() - 1)
