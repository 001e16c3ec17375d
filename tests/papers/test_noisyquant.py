"""NoisyQuant: what must hold exactly."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxformer
from jaxformer.compress.quantizers import Log, Symmetric, Uniform
from jaxformer.papers.noisyquant.model import (
    AMPLITUDES,
    Noisy,
    amplitude_search,
    clip_search,
    expected_error,
    folded_bias,
    rounding_error,
    rules,
    shift_search,
    uniform_draw,
)
from jaxformer.recipe import ConfigError

KEY = jax.random.key(0)
X = jax.random.normal(KEY, (50, 8)) ** 3
KERNEL, BIAS = jax.random.normal(KEY, (8, 6)), jnp.arange(6.0)
NOISE = uniform_draw(0, "layer", 8)


def test_no_noise_is_the_quantiser_itself():
    quantizer, state = Symmetric(4), {"scale": 0.3}
    np.testing.assert_array_equal(Noisy(quantizer)(X, jnp.zeros(8), **state), quantizer(X, **state))


@pytest.mark.parametrize(
    ("quantizer", "state"),
    [
        (Symmetric(4), {"scale": 0.3}),
        (Uniform(4), {"scale": 0.3, "zero": 7.0}),
        (Log(4), {"scale": 1.0}),
    ],
    ids=lambda x: type(x).__name__,
)
def test_the_folded_bias_is_the_same_layer(quantizer, state):
    taken_back = Noisy(quantizer)(X, NOISE, **state) @ KERNEL + BIAS
    folded = quantizer(X + NOISE, **state) @ KERNEL + folded_bias(BIAS, KERNEL, NOISE)
    np.testing.assert_allclose(folded, taken_back, atol=1e-5 * float(jnp.abs(folded).max()))


def test_without_rounding_noise_changes_nothing():
    fine = Noisy(Symmetric(16))(X, NOISE, scale=2e-3)
    np.testing.assert_allclose(fine, X, atol=2e-3)


@pytest.mark.parametrize(
    ("x", "n", "expected"),
    [
        (0.9, 1, 0.3333),
        (0.2, 1, 0.3333),
        (0.7, 0.8, 0.3908),
        (0.95, 0.3, 0.7242),
        (0.4, 1.9, 0.3423),
    ],
)
def test_the_expected_error_is_that_of_many_draws(x, n, expected):
    assert expected_error(x, n, 1.0) == pytest.approx(expected, abs=1e-4)
    draws = jax.random.uniform(KEY, (1_000_000,), minval=-n, maxval=n)
    drawn = jnp.square(rounding_error(x + draws, 1.0)).mean()
    assert drawn == pytest.approx(expected, abs=1e-3)


def test_noise_of_a_bin_helps_where_the_error_is_large():
    for x in jnp.linspace(-3, 3, 61):
        helps = expected_error(x, 1.0, 1.0) < jnp.square(rounding_error(x, 1.0))
        assert helps == (jnp.abs(rounding_error(x, 1.0)) > 1 / jnp.sqrt(3))


def test_searches_never_lose_on_what_they_saw():
    quantizer = Symmetric(4)
    clip = clip_search(X, KERNEL, quantizer)
    assert clip.losses[clip.index] == clip.losses.min()
    state = {"scale": clip.value}
    shift = shift_search(X, KERNEL, quantizer, state)
    found = amplitude_search(X, KERNEL, quantizer, state, shift.value, NOISE)
    assert found.losses.shape == (AMPLITUDES,)

    def loss(noise):
        error = Noisy(quantizer)(X, noise, **state) - X
        return float(jnp.square(error @ KERNEL).sum())

    plain, shifted, noisy = (loss(n) for n in (jnp.zeros(8), jnp.full(8, shift.value), found.value))
    assert noisy <= shifted * 1.0001
    assert shifted <= plain * 1.0001


def test_draws_are_of_a_seed_and_a_layer():
    np.testing.assert_array_equal(uniform_draw(3, "a", 8), uniform_draw(3, "a", 8))
    assert not np.allclose(uniform_draw(3, "a", 8), uniform_draw(3, "b", 8))
    assert not np.allclose(uniform_draw(3, "a", 8), uniform_draw(4, "a", 8))
    assert jnp.abs(uniform_draw(0, "a", 10_000)).max() <= 1


def test_the_head_patches_and_products_stay_as_they_are():
    chosen = rules(4, 4)
    for name, is_quantised in (
        ("encoder/stack/block_0/mixer/query", True),
        ("encoder/stack/block_0/mlp/down", True),
        ("encoder/embed/projection", False),
        ("head", False),
    ):

        class At:
            path = tuple(name.split("/"))

        assert (chosen.rule(At, "input") is not None) == is_quantised


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Noisy(Symmetric(4))(X, jnp.zeros(5), scale=1.0), r"noise of 5 channels: .* has 8"),
        (lambda: rules(4, 1), r"bits=1: must be from 2 to 16"),
        (lambda: rules(17, 4), r"bits=17: must be from 2 to 16"),
        (lambda: load(calibration__images=0), r"calibration.images=0"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def load(**fields):
    return jaxformer.load("noisyquant:tiny", **fields)
