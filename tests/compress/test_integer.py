"""Linear maps in integers give what rounded floats give."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from jaxformer.compress.integer import Integer, codes, in_integers
from jaxformer.compress.intercepted import Intercepted
from jaxformer.compress.quantized import COLLECTION, Quantized, Rule
from jaxformer.compress.quantizers import Symmetric, Uniform
from jaxformer.nn.einsum import Einsum

KEY = jax.random.key(0)


def rules(of_input, of_kernel, per="channel", per_input="tensor"):
    return (Rule(r"kernel$", of_kernel, per=per), Rule(r"input$", of_input, per=per_input))


class Two(nn.Module):
    """A map to heads and one from them."""

    @nn.compact
    def __call__(self, x):
        y = Einsum("...D,DHK->...HK", (2, 3), name="up")(x)
        return Einsum("...HK,HKD->...D", (5,), use_bias=False, name="down")(y)


def model(kind, quantised):
    return Intercepted(Two(), (kind(quantised),))


def state_of(quantised, x, zero):
    variables = model(Quantized, quantised).init(KEY, x)
    filled = jax.tree_util.tree_map_with_path(
        lambda path, a: (
            0.02 + 0.01 * jax.random.uniform(KEY, a.shape)
            if path[-1].key == "scale"
            else zero + jnp.round(20 * jax.random.uniform(KEY, a.shape))
        ),
        variables[COLLECTION],
    )
    return {"params": variables["params"], COLLECTION: filled}


@pytest.mark.parametrize("bits", [3, 8])
@pytest.mark.parametrize("kinds", [(Uniform, Uniform), (Symmetric, Uniform), (Symmetric,) * 2])
@pytest.mark.parametrize("per", ["channel", "tensor"])
def test_integers_are_what_rounded_floats_are(bits, kinds, per):
    quantised = rules(*(kind(bits) for kind in kinds), per=per)
    x = jax.random.normal(KEY, (3, 7, 4))
    variables = state_of(quantised, x, zero=2.0 ** (bits - 1))
    floats = model(Quantized, quantised).apply(variables, x)
    integers = model(Integer, quantised).apply(variables, x)
    assert float(jnp.abs(floats).max()) > 0
    np.testing.assert_allclose(integers, floats, rtol=1e-5, atol=1e-6)
    lowered = jax.jit(model(Integer, quantised).apply).lower(variables, x).as_text()
    assert lowered.count("i8>) -> tensor") >= 2 and "dot_general" in lowered


def test_a_zero_point_between_codes_moves_what_is_clipped_by_less_than_a_step():
    x = jnp.linspace(-3, 3, 101)
    quantizer, state = Uniform(4), {"scale": jnp.array([0.1]), "zero": jnp.array([7.4])}
    found = codes(quantizer, x, state)
    value = (found.code + found.offset) * found.scale
    plain = quantizer(x, **state)
    inside = (x > -0.6) & (x < 0.6)
    np.testing.assert_allclose(value[inside], plain[inside], rtol=1e-6)
    assert 0 < float(jnp.abs(value - plain).max()) < 0.1


def test_what_has_no_integers_is_rounded_floats():
    uniform = Uniform(4)
    assert in_integers("...D,DHK->...HK", *rules(uniform, uniform)[::-1])
    assert not in_integers("...HD,HDK->...HK", *rules(uniform, uniform)[::-1])
    assert not in_integers("...D,DHK->...HK", None, rules(uniform, uniform)[0])
    wide = rules(Uniform(9), uniform)
    assert not in_integers("...D,DHK->...HK", *wide[::-1])
    quantised = rules(uniform, uniform, per_input="channel")
    x = jax.random.normal(KEY, (3, 4))
    variables = state_of(quantised, x, zero=8.0)
    np.testing.assert_array_equal(
        model(Integer, quantised).apply(variables, x),
        model(Quantized, quantised).apply(variables, x),
    )
