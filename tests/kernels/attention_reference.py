"""Attention in float64 NumPy, written from the definition and sharing nothing with the kernels."""

import dataclasses
from collections.abc import Callable

import numpy as np


@dataclasses.dataclass(frozen=True)
class Case:
    """One call: sizes, and each part twice, for the op and for NumPy.

    `visible(b, i, j)` is broadcast over index arrays; `score(s, b, h, i, j, aux)` and
    `prob(p, ..., aux)` receive the whole (B, H, L, S) array and the raw operand arrays.
    """

    sizes: tuple[int, ...]  # B, L, S, H, G, K, Kv
    mask: Callable = None  # sizes -> Mask
    visible: Callable = lambda b, i, j: np.bool_(True)
    call: dict = dataclasses.field(default_factory=dict)  # further keywords of `attention`
    aux: dict = dataclasses.field(default_factory=dict)  # name -> (operand class, shape)
    score: Callable = None
    prob: Callable = None
    sink: bool = False
    head_map: tuple[int, ...] = None
    q_pos: np.ndarray = None
    k_pos: np.ndarray = None


def draw(case, seed=0):
    """The differentiable arrays of a case, float32 values in a flat dict."""
    rng = np.random.default_rng(seed)
    b, l, s, h, g, k, kv = case.sizes
    shapes = {"q": (b, l, h, k), "k": (b, s, g, k), "v": (b, s, g, kv)}
    shapes |= {f"aux_{name}": shape for name, (_, shape) in case.aux.items()}
    if case.sink:
        shapes["sink"] = (h,)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def attend(case, x):
    """(output, LSE) of the case for a dict of arrays, in float64."""
    x = {name: np.asarray(value, np.float64) for name, value in x.items()}
    b, l, s, h, g, k, _ = case.sizes
    heads = case.head_map or tuple(i * g // h for i in range(h))
    keys, values = x["k"][:, :, heads], x["v"][:, :, heads]
    bi, hi = np.arange(b)[:, None, None, None], np.arange(h)[None, :, None, None]
    qi = np.arange(l) if case.q_pos is None else case.q_pos
    ki = np.arange(s) if case.k_pos is None else case.k_pos
    qi, ki = qi.reshape(-1, 1, l, 1), ki.reshape(-1, 1, 1, s)
    aux = {name[4:]: value for name, value in x.items() if name.startswith("aux_")}

    scores = np.einsum("blhk,bshk->bhls", x["q"], keys) * case.call.get("scale", k**-0.5)
    if case.score:
        scores = case.score(scores, bi, hi, qi, ki, aux)
    seen = np.broadcast_to(case.visible(bi, qi, ki), scores.shape)
    e = np.where(seen, np.exp(scores), 0.0)
    total = e.sum(-1)
    if case.sink:
        total = total + np.exp(x["sink"])[:, None]
    p = e / np.where(total > 0, total, 1)[..., None]
    if case.prob:
        p = np.where(seen, case.prob(p, bi, hi, qi, ki, aux), 0.0)
    with np.errstate(divide="ignore"):
        return np.einsum("bhls,bshk->blhk", p, values), np.log(total)


def score_of(o, lse, weights):
    """A scalar of both outputs; rows that see nothing have no LSE to count."""
    return (o * weights[0]).sum() + np.where(np.isinf(lse), 0.0, lse * weights[1]).sum()


def slope(case, x, weights, name, direction, step=1e-5):
    """The derivative of `score_of` along a direction of one array, by central differences.

    In float64 its error is about step ** 2 = 1e-10, far below the float32 of the kernels.
    """
    ends = [
        score_of(*attend(case, {**x, name: np.float64(x[name]) + sign * step * direction}), weights)
        for sign in (1, -1)
    ]
    return (ends[0] - ends[1]) / (2 * step)


def toeplitz(table, l, s):
    """(H, L + S - 1) -> (H, L, S), by the definition of the operand."""
    i, j = np.indices((l, s))
    return np.atleast_2d(table)[:, i - j + s - 1]
