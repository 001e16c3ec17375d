"""Distributions over the real line made of bars, for regression by classification.

Borders b_0 < ... < b_J cut a range into bars (b_j, b_{j+1}], the first closed; logits (..., J) give
the mass of each. The density inside a bar is uniform: the "Riemann distribution" of Müller et al.
2022, arXiv 2112.10510. A distribution holds the borders alone and is a pytree; its methods
take the logits, and targets or probabilities that broadcast against logits.shape[:-1].
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import ndtr, ndtri

HALF_NORMAL_MEDIAN = 0.6744897501960817  # of a half-normal of scale 1
HALF_NORMAL_MEAN = (2 / np.pi) ** 0.5


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class BarDistribution:
    """Bars with bounded support [b_0, b_J]; `borders` (J + 1,).

    Raises:
        ValueError: the borders do not rise strictly (seen where they are not traced).
    """

    borders: jax.Array

    def __post_init__(self) -> None:
        # Transformations rebuild pytrees around tracers and placeholders.
        borders = _concrete(self.borders)
        if borders is None:
            return
        if borders.ndim != 1 or len(borders) < 2:
            raise ValueError(
                f"borders: need at least two along one axis, got shape {borders.shape}"
            )
        falls = np.flatnonzero(~(np.diff(borders) > 0))
        if len(falls):
            i = int(falls[0])
            raise ValueError(
                f"borders: must rise strictly, but borders[{i}]={borders[i]:g} is followed by "
                f"{borders[i + 1]:g}"
            )

    @classmethod
    def from_prior_samples(cls, samples: jax.typing.ArrayLike, bars: int) -> Self:
        """Bars that each hold the same number of the `samples` (any shape).

        An inner border lies midway between two neighbouring samples, the ends are the extremes.
        Samples at the end that do not divide by `bars` are left out.

        Raises:
            ValueError: fewer samples than bars, or NaN or too many equal samples among them.
        """
        samples = jnp.ravel(jnp.asarray(samples))
        each = samples.size // bars
        if bars < 1 or each < 1:
            raise ValueError(f"bars: {bars}; give from 1 to {samples.size}, the number of samples")
        groups = jnp.sort(samples[: bars * each]).reshape(bars, each)
        inner = (groups[:-1, -1] + groups[1:, 0]) / 2
        return cls(jnp.concatenate([groups[:1, 0], inner, groups[-1:, -1]]))

    @property
    def bars(self) -> int:
        return self.borders.shape[0] - 1

    @property
    def widths(self) -> jax.Array:
        return jnp.diff(self.borders)

    # What a single bar is: a law of its own, scaled to mass 1. Overridden where the ends differ.

    def _bar_log_density(self, y: jax.Array, bar: jax.Array) -> jax.Array:
        """Log density of `bar` (...) at y (...)."""
        inside = (y >= self.borders[0]) & (y <= self.borders[-1])
        return jnp.where(inside, -jnp.log(self.widths)[bar], -jnp.inf)

    def _bar_below(self, y: jax.Array, bar: jax.Array) -> jax.Array:
        """Share of `bar` (...) that lies below y (...)."""
        return jnp.clip((y - self.borders[bar]) / self.widths[bar], 0, 1)

    def _bar_inverse(self, share: jax.Array, bar: jax.Array) -> jax.Array:
        """The point of `bar` (...) below which a `share` (...) of it lies."""
        return self.borders[bar] + share * self.widths[bar]

    def _bar_means(self) -> jax.Array:
        return (self.borders[1:] + self.borders[:-1]) / 2

    def _bar_variances(self) -> jax.Array:
        return jnp.square(self.widths) / 12

    def _bar_entropies(self) -> jax.Array:
        return jnp.log(self.widths)

    def _bar_peaks(self) -> tuple[jax.Array, jax.Array]:
        """Where each bar's density is largest (its centre if uniform), and its log there."""
        return self._bar_means(), -jnp.log(self.widths)

    def _bar_improvements(self, best: jax.Array) -> jax.Array:
        """E[max(y - best, 0)] of each bar: (..., J) for `best` (...)."""
        left, right, best = self.borders[:-1], self.borders[1:], best[..., None]
        above = right - jnp.clip(best, left, right)
        # Uniform on the part above `best`, of length `above`, whose mean is right - above / 2.
        return above / self.widths * (right - above / 2 - best)

    # The whole distribution.

    def index(self, y: jax.typing.ArrayLike) -> jax.Array:
        """The bar that holds y; a point outside belongs to the nearest."""
        bar = jnp.searchsorted(self.borders, jnp.asarray(y), side="left") - 1
        return jnp.clip(bar, 0, self.bars - 1)

    def nll(
        self, logits: jax.Array, y: jax.typing.ArrayLike, *, ignore_nan_targets: bool = False
    ) -> jax.Array:
        """-log density at y, (...); with `ignore_nan_targets` 0 where y is NaN.

        Traced targets cannot raise: one outside the support gives inf, NaN gives NaN.

        Raises:
            ValueError: y is NaN and not to be ignored, or outside the support.
        """
        self._check_targets(y, ignore_nan_targets)
        y = jnp.asarray(y)
        loss = -self.log_density(logits, y)
        return jnp.where(jnp.isnan(y), 0.0 if ignore_nan_targets else jnp.nan, loss)

    def _check_targets(self, y: jax.typing.ArrayLike, ignore_nan_targets: bool) -> None:
        targets = _concrete(y)
        if targets is None:
            return
        if not ignore_nan_targets and np.isnan(targets).any():
            raise ValueError("y: has NaN targets; pass ignore_nan_targets=True to leave them out")
        self._check_support(targets)

    def _check_support(self, targets: np.ndarray) -> None:
        borders = _concrete(self.borders)
        if borders is None:
            return
        outside = targets[(targets < borders[0]) | (targets > borders[-1])]
        if outside.size:
            raise ValueError(
                f"y: {outside[0]:g} is outside the support [{borders[0]:g}, {borders[-1]:g}]; "
                "use FullSupportBarDistribution or wider borders"
            )

    def log_density(self, logits: jax.Array, y: jax.typing.ArrayLike) -> jax.Array:
        y = jnp.asarray(y)
        bar = self.index(y)
        return _pick(jax.nn.log_softmax(logits), bar) + self._bar_log_density(y, bar)

    def pdf(self, logits: jax.Array, y: jax.typing.ArrayLike) -> jax.Array:
        return jnp.exp(self.log_density(logits, y))

    def cdf(self, logits: jax.Array, y: jax.typing.ArrayLike) -> jax.Array:
        y = jnp.asarray(y)
        mass, bar = jax.nn.softmax(logits), self.index(y)
        before = jnp.cumsum(mass, -1) - mass
        return _pick(before, bar) + _pick(mass, bar) * self._bar_below(y, bar)

    def icdf(self, logits: jax.Array, q: jax.typing.ArrayLike) -> jax.Array:
        """The smallest y whose cdf is q."""
        q = jnp.asarray(q)
        mass = jax.nn.softmax(logits)
        total = jnp.cumsum(mass, -1)
        bar = jnp.minimum((total < q[..., None]).sum(-1), self.bars - 1)
        inside = _pick(mass, bar)
        share = (q - _pick(total - mass, bar)) / jnp.where(inside == 0, 1, inside)
        return self._bar_inverse(jnp.clip(share, 0, 1), bar)

    def quantile(self, logits: jax.Array, center_prob: float = 0.682) -> jax.Array:
        """Both ends (..., 2) of the central interval of that mass."""
        tail = (1 - center_prob) / 2
        return jnp.stack([self.icdf(logits, tail), self.icdf(logits, 1 - tail)], -1)

    def median(self, logits: jax.Array) -> jax.Array:
        return self.icdf(logits, 0.5)

    def ucb(self, logits: jax.Array, rest_prob: float = 0.159) -> jax.Array:
        """Upper confidence bound: `rest_prob` lies above it."""
        return self.icdf(logits, 1 - rest_prob)

    def mean(self, logits: jax.Array) -> jax.Array:
        return jax.nn.softmax(logits) @ self._bar_means()

    def mean_of_square(self, logits: jax.Array) -> jax.Array:
        return jax.nn.softmax(logits) @ (self._bar_variances() + jnp.square(self._bar_means()))

    def variance(self, logits: jax.Array) -> jax.Array:
        deviation = self._bar_means() - self.mean(logits)[..., None]
        return (jax.nn.softmax(logits) * (self._bar_variances() + jnp.square(deviation))).sum(-1)

    def mode(self, logits: jax.Array) -> jax.Array:
        """Where the density is largest; the centre of its bar where it is level."""
        places, log_density = self._bar_peaks()
        return places[jnp.argmax(logits + log_density, -1)]

    def entropy(self, logits: jax.Array) -> jax.Array:
        """Differential entropy in nats."""
        log_mass = jax.nn.log_softmax(logits)
        mass = jnp.exp(log_mass)
        # An empty bar has log mass -inf and counts nothing.
        own = jnp.where(mass > 0, mass * log_mass, 0).sum(-1)
        return mass @ self._bar_entropies() - own

    def ei(self, logits: jax.Array, best: jax.typing.ArrayLike) -> jax.Array:
        """Expected improvement over `best`, to be maximised: E[max(y - best, 0)]."""
        return (jax.nn.softmax(logits) * self._bar_improvements(jnp.asarray(best))).sum(-1)

    def pi(self, logits: jax.Array, best: jax.typing.ArrayLike) -> jax.Array:
        """Probability of improvement: P(y > best)."""
        return 1 - self.cdf(logits, best)

    def sample(self, key: jax.Array, logits: jax.Array, shape: Sequence[int] = ()) -> jax.Array:
        """Draws of shape (*shape, ...)."""
        q = jax.random.uniform(key, (*shape, *logits.shape[:-1]), self.borders.dtype)
        return self.icdf(logits, q)

    def masses(self, other: BarDistribution, logits: jax.Array) -> jax.Array:
        """What `other` with its `logits` puts on each of these bars, (..., J).

        Mass beyond the ends goes to the end bars, so that the sum is 1.
        """
        inner = other.cdf(logits[..., None, :], self.borders[1:-1])
        return jnp.maximum(jnp.diff(inner, axis=-1, prepend=0.0, append=1.0), 0)

    def average(self, parts: Sequence[tuple[BarDistribution, jax.Array]]) -> jax.Array:
        """Logits (..., J) of the mean of several distributions, moved onto these bars."""
        mean = sum(self.masses(other, logits) for other, logits in parts) / len(parts)
        return jnp.log(mean)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class FullSupportBarDistribution(BarDistribution):
    """Bars whose first and last are half-normals, so that every real number has a density.

    The half-normals start at b_1 and b_{J-1} and run outwards; half of the mass of each lies
    between the two borders of its bar.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        borders = _concrete(self.borders)
        if borders is not None and len(borders) < 3:
            raise ValueError("borders: the two half-normals need at least two bars")

    def _scales(self) -> tuple[jax.Array, jax.Array]:
        """Of the half-normals at the left and at the right."""
        return self.widths[0] / HALF_NORMAL_MEDIAN, self.widths[-1] / HALF_NORMAL_MEDIAN

    def _ends(self, inner: jax.Array, left: jax.Array, right: jax.Array) -> jax.Array:
        """A number per bar with those of the two end bars put in place."""
        return inner.at[0].set(left).at[-1].set(right)

    def _tail(self, y: jax.Array, bar: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Whether `bar` is the left or the right end, and how many scales y lies outwards in it."""
        left, right = self._scales()
        is_left, is_right = bar == 0, bar == self.bars - 1
        u = jnp.where(is_left, (self.borders[1] - y) / left, (y - self.borders[-2]) / right)
        return is_left, is_right, jnp.where(is_left | is_right, jnp.maximum(u, 0), 0)

    def _bar_log_density(self, y: jax.Array, bar: jax.Array) -> jax.Array:
        is_left, is_right, u = self._tail(y, bar)
        log_scale = jnp.log(jnp.where(is_left, *self._scales()))
        tail = jnp.log(HALF_NORMAL_MEAN) - jnp.square(u) / 2 - log_scale
        return jnp.where(is_left | is_right, tail, -jnp.log(self.widths)[bar])

    def _bar_below(self, y: jax.Array, bar: jax.Array) -> jax.Array:
        is_left, is_right, u = self._tail(y, bar)
        outwards = 2 * ndtr(-u)
        below = super()._bar_below(y, bar)
        return jnp.where(is_left, outwards, jnp.where(is_right, 1 - outwards, below))

    def _bar_inverse(self, share: jax.Array, bar: jax.Array) -> jax.Array:
        left, right = self._scales()
        inner = super()._bar_inverse(share, bar)
        below = self.borders[1] + left * ndtri(share / 2)
        above = self.borders[-2] - right * ndtri((1 - share) / 2)
        return jnp.where(bar == 0, below, jnp.where(bar == self.bars - 1, above, inner))

    def _bar_means(self) -> jax.Array:
        left, right = (HALF_NORMAL_MEAN * scale for scale in self._scales())
        return self._ends(super()._bar_means(), self.borders[1] - left, self.borders[-2] + right)

    def _bar_variances(self) -> jax.Array:
        left, right = ((1 - 2 / np.pi) * jnp.square(scale) for scale in self._scales())
        return self._ends(super()._bar_variances(), left, right)

    def _bar_entropies(self) -> jax.Array:
        left, right = (0.5 * jnp.log(np.pi / 2) + jnp.log(scale) + 0.5 for scale in self._scales())
        return self._ends(super()._bar_entropies(), left, right)

    def _bar_peaks(self) -> tuple[jax.Array, jax.Array]:
        places, heights = super()._bar_peaks()
        left, right = (jnp.log(HALF_NORMAL_MEAN / scale) for scale in self._scales())
        places = self._ends(places, self.borders[1], self.borders[-2])
        return places, self._ends(heights, left, right)

    def _bar_improvements(self, best: jax.Array) -> jax.Array:
        left, right = self._scales()
        inner = super()._bar_improvements(best)
        # y = b_1 - left u and y = b_{J-1} + right u with u half-normal of scale 1.
        low, high = (self.borders[1] - best) / left, (best - self.borders[-2]) / right
        low = left * (low - _half_normal_capped_mean(jnp.maximum(low, 0)))
        above = HALF_NORMAL_MEAN - _half_normal_capped_mean(jnp.maximum(high, 0))
        high = right * (above + jnp.maximum(-high, 0))
        return inner.at[..., 0].set(jnp.maximum(low, 0)).at[..., -1].set(high)

    def _check_support(self, targets: np.ndarray) -> None:
        """Every number is in the support."""


def _half_normal_capped_mean(cap: jax.Array) -> jax.Array:
    """E[min(u, cap)] of a half-normal of scale 1."""
    return HALF_NORMAL_MEAN * (1 - jnp.exp(-jnp.square(cap) / 2)) + cap * 2 * ndtr(-cap)


def _pick(values: jax.Array, bar: jax.Array) -> jax.Array:
    """values[..., bar] for values (..., J) and bar (...), broadcast against each other."""
    shape = jnp.broadcast_shapes(values.shape[:-1], bar.shape)
    values = jnp.broadcast_to(values, (*shape, values.shape[-1]))
    bar = jnp.broadcast_to(bar, shape)
    return jnp.take_along_axis(values, bar[..., None], -1)[..., 0]


def _concrete(x: object) -> np.ndarray | None:
    """The values of an array that is not traced."""
    known = isinstance(x, jax.Array | np.ndarray | np.generic | float | int | Sequence)
    return np.asarray(x) if known and not isinstance(x, jax.core.Tracer) else None
