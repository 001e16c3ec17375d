"""Convolutions on grids, norms over batches, and the merges of hierarchies."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.errors import ConfigError
from jaxformer.nn.batch_norm import BatchNorm, ConvStem, NormedConv
from jaxformer.nn.depthwise import ConvPosition, DepthwiseConv, _convolved, _looped
from jaxformer.nn.patch import ConvMerge

KEY = jax.random.key(0)


@pytest.mark.parametrize("shape", [(2, 5, 7, 3), (1, 2, 3, 4)])
def test_both_forms_of_a_depthwise_convolution_agree(shape):
    x = jax.random.normal(KEY, shape)
    kernel = jax.random.normal(KEY, (7, 7, shape[-1]))

    def loss(form, x, kernel):
        return jnp.sin(form(x, kernel)).sum()

    for a, b in zip(
        *(jax.grad(loss, (1, 2))(form, x, kernel) for form in (_looped, _convolved)), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(_looped(x, kernel), _convolved(x, kernel), rtol=1e-4, atol=1e-4)


def test_positions_leave_channels_apart():
    x = jax.random.normal(KEY, (2, 12, 3))
    layer = ConvPosition((3, 4))
    params = layer.init(KEY, x)
    y = layer.apply(params, x)
    np.testing.assert_allclose(layer.apply(params, x.at[..., 1].set(0))[..., 0], y[..., 0])
    with pytest.raises(ConfigError, match=r"ConvPosition\.grid=\(3, 4\): the sequence has 11"):
        layer.apply(params, x[:, :11])
    with pytest.raises(ConfigError, match=r"DepthwiseConv\.size=4: must be odd"):
        DepthwiseConv(4).init(KEY, x.reshape(2, 3, 4, 3))


def test_batch_norm_trains_by_the_batch_and_answers_by_what_it_remembers():
    x = 3 + 2 * jax.random.normal(KEY, (4, 5, 6, 3))
    layer = BatchNorm(momentum=0.1)
    variables = layer.init(KEY, x)
    y, changed = layer.apply(variables, x, train=True, mutable=["batch_stats"])
    np.testing.assert_allclose(y.mean((0, 1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(y.var((0, 1, 2)), 1, atol=1e-3)
    running = changed["batch_stats"]
    np.testing.assert_allclose(running["mean"], 0.1 * x.mean((0, 1, 2)), rtol=1e-5)
    expected = 0.9 + 0.1 * np.var(x, axis=(0, 1, 2), ddof=1)
    np.testing.assert_allclose(running["var"], expected, rtol=1e-5)
    variables = {**variables, **changed}
    whole = layer.apply(variables, x)
    np.testing.assert_array_equal(layer.apply(variables, x[:1]), whole[:1])
    assert layer.apply(variables, x.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_a_bias_before_a_batch_norm_has_no_gradient_while_training():
    x = jax.random.normal(KEY, (2, 8, 8, 3))
    layer = NormedConv(4)
    variables = layer.init(KEY, x)

    def gradient(train):
        def loss(params):
            y = layer.apply(
                {**variables, "params": params}, x, train=train, mutable=["batch_stats"]
            )
            return jnp.sin(y[0]).sum()

        return jax.grad(loss)(variables["params"])["bias"]

    assert not np.any(gradient(True)) and np.all(gradient(False))


def test_odd_sides_are_filled_up():
    image = jax.random.normal(KEY, (1, 30, 37, 3))
    stem = ConvStem(8)
    variables = stem.init(KEY, image)
    filled = jnp.pad(image, ((0, 0), (0, 2), (0, 3), (0, 0)))
    y = stem.apply(variables, image)
    assert y.shape == (1, 80, 8)
    np.testing.assert_array_equal(y, stem.apply(variables, filled))
    x = jax.random.normal(KEY, (1, 15, 4))
    merge = ConvMerge((3, 5), 6)
    params = merge.init(KEY, x)
    y = merge.apply(params, x)
    assert y.shape == (1, 6, 6)
    # The zeros come after the norm: what the last corner holds is of one position alone.
    other = merge.apply(params, x.at[:, :14].add(1.0))
    np.testing.assert_array_equal(y[:, -1], other[:, -1])
