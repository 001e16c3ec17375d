"""What becomes of values: quantisers, and scales read off them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.compress import adaround, observers
from jaxformer.compress.quantizers import (
    GELU_SHIFT,
    Log,
    Shifted,
    Symmetric,
    TwinUniform,
    Uniform,
)
from jaxformer.compress.search import each, least, row_errors
from jaxformer.recipe import ConfigError

KEY = jax.random.key(0)
X = jax.random.normal(KEY, (40, 6))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_values_of_few_bits_are_few_and_stay_where_they_are(bits):
    state = observers.min_max(bits, X, None)
    y = Uniform(bits)(X, **state)
    assert len(np.unique(y)) <= 2**bits
    np.testing.assert_allclose(Uniform(bits)(y, **state), y, atol=1e-6)
    # Nothing is clipped, so that no value moves by more than half a step and the rounding of z.
    assert jnp.abs(y - X).max() <= state["scale"].max() * 1.001
    s = observers.symmetric_max(bits, X, (0,))
    z = Symmetric(bits)(X, **s)
    assert jnp.all(jnp.abs(z - X) <= s["scale"] / 2 + 1e-6)


def test_gradients_pass_where_codes_are_not_clipped():
    x = jnp.array([-3.0, 0.0, 0.3, 0.7, 5.0])
    gradient = jax.grad(lambda x: Uniform(2)(x, 0.5, 0.0).sum())(x)
    np.testing.assert_array_equal(gradient, [0, 1, 1, 1, 0])


def test_twins_have_a_scale_for_each_sign():
    y = TwinUniform(3)(jnp.array([0.9, -0.9, 10.0, -10.0]), 1.0, 0.25)
    np.testing.assert_allclose(y, [1.0, -1.0, 3.0, -1.0])


def test_logarithms_of_base_two_and_its_root():
    x = jnp.array([1.0, 0.5, 0.26, 0.2, 1e-3, 0.0, 2.0])
    np.testing.assert_allclose(Log(3)(x, 1.0), [1, 0.5, 0.25, 0.25, 0, 0, 1])
    root = Log(4, 2)(x, 1.0)
    np.testing.assert_allclose(root[3], 2**-2.5, rtol=1e-6)
    shifted = Shifted(Log(4), GELU_SHIFT)
    assert shifted(jnp.float32(-GELU_SHIFT), scale=1.0) == pytest.approx(-GELU_SHIFT)


def test_percentiles_choose_for_each_channel_by_itself():
    spiky = X.at[0, 0].set(1000.0)
    together = observers.percentile(4, spiky, (0,))
    for i in range(X.shape[1]):
        alone = observers.percentile(4, spiky[:, i : i + 1], (0,))
        np.testing.assert_allclose(alone["scale"].ravel(), together["scale"][0, i], rtol=1e-5)
        np.testing.assert_allclose(alone["zero"].ravel(), together["zero"][0, i])


def test_errors_of_a_product_are_those_of_the_product():
    left, right = jax.random.normal(KEY, (2, 7, 5)), jax.random.normal(KEY, (2, 5, 9))
    narrow = right[..., :3]
    for float_right in (right, narrow):
        changed = float_right * 1.1
        candidate = left + 0.3
        wanted = jnp.square(candidate @ changed - left @ float_right).sum(-1)
        found = row_errors(left, changed, float_right)(candidate)
        np.testing.assert_allclose(found, wanted, rtol=2e-4)


def test_the_least_are_chosen_by_column():
    candidates = {"scale": jnp.array([[1.0, 9.0], [2.0, 8.0], [3.0, 7.0]])}
    errors = each(lambda state: jnp.abs(state["scale"] - jnp.array([2.9, 8.9])), candidates)
    found = least(candidates, errors, 2)["scale"]
    np.testing.assert_array_equal(found, [[3, 9], [2, 8]])


def test_rounding_that_is_learned_begins_where_it_was():
    quantizer, scale = adaround.AdaRound(8), 0.05
    alpha = adaround.start(X, scale)
    np.testing.assert_allclose(quantizer(X, scale, 128.0, alpha), X, atol=1e-5)
    baked = quantizer.unclipped(X, scale, alpha)
    # Baked weights lie on the grid: quantising them again changes nothing.
    hard = quantizer.hard(X, scale, 128.0, alpha)
    np.testing.assert_allclose(Uniform(8)(baked, scale, 128.0), hard, atol=1e-6)
    assert adaround.indecision(jnp.array([50.0, -50.0]), 2.0) == 0


@pytest.mark.parametrize(
    "make",
    [lambda: Uniform(0), lambda: Symmetric(1), lambda: Log(17)],
    ids=["uniform", "symmetric", "log"],
)
def test_numbers_of_bits_that_make_no_sense_are_refused(make):
    with pytest.raises(ConfigError, match=r"bits=.*must be from"):
        make()
