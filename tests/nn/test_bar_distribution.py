"""Bars: every method against the density integrated on a grid, then against draws."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.nn.bar_distribution import BarDistribution, FullSupportBarDistribution

BORDERS = jnp.asarray([-2.0, -1.2, -0.9, -0.1, 0.3, 0.35, 1.1, 1.9])
LOGITS = jax.random.normal(jax.random.key(0), (3, 7)) * 1.5
LAWS = {"bounded": BarDistribution(BORDERS), "full": FullSupportBarDistribution(BORDERS)}
both = pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)


def integral(law, of=lambda y, p: p, cells=20_000):
    """Of `of(y, density)` over the line, (3,): midpoints of cells whose ends meet the borders."""
    # Half-normals of scale 1.2 are below 1e-20 at the outermost edge.
    reach = 12.0 if isinstance(law, FullSupportBarDistribution) else 0.0
    edges = np.unique([BORDERS[0] - reach, *BORDERS, BORDERS[-1] + reach]).astype(np.float64)
    grids = [np.linspace(*ends, cells // len(edges)) for ends in itertools.pairwise(edges)]
    y = np.concatenate([(g[1:] + g[:-1]) / 2 for g in grids])
    width = np.concatenate([np.diff(g) for g in grids])
    density = np.float64(jax.jit(law.pdf)(LOGITS[:, None], jnp.asarray(y, jnp.float32)))
    return (of(y, density) * width).sum(-1)


@both
def test_density_integrates_to_one_and_gives_the_moments(law):
    np.testing.assert_allclose(integral(law), 1, atol=1e-4)
    mean = integral(law, lambda y, p: y * p)
    square = integral(law, lambda y, p: y**2 * p)
    np.testing.assert_allclose(law.mean(LOGITS), mean, atol=1e-4)
    np.testing.assert_allclose(law.mean_of_square(LOGITS), square, rtol=1e-4)
    np.testing.assert_allclose(law.variance(LOGITS), square - mean**2, rtol=1e-3)
    entropy = integral(law, lambda y, p: -p * np.log(np.maximum(p, 1e-300)))
    np.testing.assert_allclose(law.entropy(LOGITS), entropy, atol=2e-4)


@both
@pytest.mark.parametrize("best", [-2.7, -1.5, 0.2, 1.5, 2.6])
def test_improvement_is_what_it_says(law, best):
    """Below, inside and above both end bars."""
    gain = integral(law, lambda y, p: np.maximum(y - best, 0) * p)
    np.testing.assert_allclose(law.ei(LOGITS, best), gain, atol=2e-4)
    chance = integral(law, lambda y, p: (y > best) * p)
    np.testing.assert_allclose(law.pi(LOGITS, best), chance, atol=1e-3)


@both
def test_cdf_inverts(law):
    q = jnp.linspace(0.001, 0.999, 97)

    @jax.jit
    def levels(logits):
        each = logits[:, None]
        inverse, ends = law.icdf(each, q), law.quantile(logits, 0.9)
        center = law.cdf(logits, law.median(logits))
        return law.cdf(each, inverse), law.cdf(each, ends), center, law.pi(logits, law.ucb(logits))

    for found, wanted in zip(levels(LOGITS), (q, [0.05, 0.95], 0.5, 0.159), strict=True):
        np.testing.assert_allclose(found, np.broadcast_to(wanted, found.shape), atol=1e-5)


@both
def test_draws_have_the_moments(law):
    y = np.float64(jax.jit(law.sample, static_argnums=2)(jax.random.key(1), LOGITS, (100_000,)))
    variance = np.float64(law.variance(LOGITS))
    # Four standard errors; that of the variance is sqrt(kurtosis - 1), at most 3 here.
    np.testing.assert_array_less(
        np.abs(y.mean(0) - law.mean(LOGITS)), 4 * (variance / len(y)) ** 0.5
    )
    np.testing.assert_array_less(np.abs(y.var(0) - variance), 4 * 3 * variance / len(y) ** 0.5)


def test_half_of_a_tail_lies_within_its_bar():
    law = LAWS["full"]
    mass = jax.nn.softmax(LOGITS)
    np.testing.assert_allclose(law.cdf(LOGITS, BORDERS[0]), mass[:, 0] / 2, atol=1e-6)
    np.testing.assert_allclose(law.cdf(LOGITS, BORDERS[1]), mass[:, 0], atol=1e-6)
    np.testing.assert_allclose(law.pi(LOGITS, BORDERS[-1]), mass[:, -1] / 2, atol=1e-6)
    # Far out the tail keeps its relative precision: 1e-4 of p_0 is 3.9 scales away.
    far = law.icdf(LOGITS, 1e-4 * mass[:, 0])
    np.testing.assert_allclose(law.cdf(LOGITS, far), 1e-4 * mass[:, 0], rtol=1e-3)


@both
def test_mode_is_the_highest_point(law):
    y = jnp.linspace(-3, 3, 4001)
    best = jax.jit(law.pdf)(LOGITS[:, None], y).max(-1)
    np.testing.assert_allclose(law.pdf(LOGITS, law.mode(LOGITS)), best, rtol=1e-3)
    peaked = jnp.zeros(7).at[0].set(9.0)
    place = -1.2 if isinstance(law, FullSupportBarDistribution) else -1.6
    np.testing.assert_allclose(law.mode(peaked), place, atol=1e-6)


def test_bars_are_closed_at_the_right():
    law = LAWS["bounded"]
    np.testing.assert_array_equal(law.index(BORDERS), [0, 0, 1, 2, 3, 4, 5, 6])


@both
def test_average_mixes_on_other_borders(law):
    onto = FullSupportBarDistribution(jnp.linspace(-1.5, 1.5, 9))
    other = FullSupportBarDistribution(jnp.asarray([-1.0, 0.0, 0.5, 1.0]))
    inner = onto.borders[1:-1]

    @jax.jit
    def both_ways(logits, flat):
        mixed = onto.average([(law, logits), (other, flat)])
        return jnp.exp(mixed), law.cdf(logits[:, None], inner) + other.cdf(flat[:, None], inner)

    mixed, below = both_ways(LOGITS, jnp.zeros((3, 3)))
    np.testing.assert_allclose(mixed.sum(-1), 1, atol=1e-6)
    np.testing.assert_allclose(jnp.cumsum(mixed, -1)[:, :-1], below / 2, atol=1e-6)


def test_prior_samples_give_bars_of_equal_mass():
    samples = np.random.default_rng(0).normal(size=1009).astype(np.float32)
    law = BarDistribution.from_prior_samples(samples, 12)
    kept = samples[: 12 * 84]
    np.testing.assert_array_equal(np.bincount(law.index(kept)), np.full(12, 84))
    assert law.borders[0] == kept.min() and law.borders[-1] == kept.max()


def test_a_distribution_is_a_pytree():
    law = jax.tree.map(lambda b: 2 * b, LAWS["full"])
    assert isinstance(law, FullSupportBarDistribution)
    nll = jax.jit(lambda law, y: law.nll(LOGITS, y))(LAWS["full"], jnp.asarray([0.1, 5.0, -3.0]))
    np.testing.assert_allclose(
        nll, LAWS["full"].nll(LOGITS, jnp.asarray([0.1, 5.0, -3.0])), rtol=1e-6
    )


def test_nan_targets_are_refused_or_ignored():
    y = jnp.asarray([0.1, jnp.nan, 0.2])
    with pytest.raises(ValueError, match=r"NaN targets; pass ignore_nan_targets=True"):
        LAWS["bounded"].nll(LOGITS, y)
    assert jnp.isnan(jax.jit(LAWS["bounded"].nll)(LOGITS, y)[1])

    def total(logits):
        return LAWS["full"].nll(logits, y, ignore_nan_targets=True).sum()

    gradient = jax.grad(total)(LOGITS)
    assert np.isfinite(gradient).all() and not gradient[1].any() and gradient[0].any()


def test_what_is_outside_is_seen():
    y = jnp.asarray([0.0, 2.5, 0.0])
    with pytest.raises(ValueError, match=r"y: 2.5 is outside the support \[-2, 1.9\]"):
        LAWS["bounded"].nll(LOGITS, y)
    traced = jax.jit(LAWS["bounded"].nll)(LOGITS, y)
    assert np.isposinf(traced[1]) and np.isfinite(traced[::2]).all()
    assert np.isfinite(LAWS["full"].nll(LOGITS, y)).all()


@pytest.mark.parametrize(
    ("borders", "message"),
    [
        ([0.0, 2.0, 1.0], r"rise strictly, but borders\[1\]=2 is followed by 1"),
        ([0.0, 1.0, 1.0, 2.0], r"rise strictly, but borders\[1\]=1 is followed by 1"),
        ([0.0, float("nan"), 1.0], "rise strictly"),
        ([1.0], "at least two"),
    ],
)
def test_borders_must_rise(borders, message):
    with pytest.raises(ValueError, match=message):
        BarDistribution(jnp.asarray(borders))


def test_half_normals_need_two_bars():
    with pytest.raises(ValueError, match="at least two bars"):
        FullSupportBarDistribution(jnp.asarray([0.0, 1.0]))


def test_equal_samples_give_no_bars():
    with pytest.raises(ValueError, match="rise strictly"):
        BarDistribution.from_prior_samples(np.zeros(100), 10)
    with pytest.raises(ValueError, match="bars: 11; give from 1 to 10"):
        BarDistribution.from_prior_samples(np.arange(10.0), 11)
