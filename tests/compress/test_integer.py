"""Linear maps in integers give what rounded floats give."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from jaxformer.compress.integer import QuantizedModel, codes, in_integers
from jaxformer.compress.intercepted import Intercepted
from jaxformer.compress.packed import has_packed, pack_kernels
from jaxformer.compress.quantized import COLLECTION, Quantized, Rule
from jaxformer.compress.quantizers import Log, Symmetric, Uniform
from jaxformer.nn.einsum import Einsum

KEY = jax.random.key(0)


def rules(of_input, of_kernel, per="channel", per_input="tensor"):
    return Quantized(
        (Rule(r"kernel$", of_kernel, per=per), Rule(r"input$", of_input, per=per_input))
    )


class Two(nn.Module):
    """A map to heads and one from them."""

    @nn.compact
    def __call__(self, x):
        y = Einsum("...D,DHK->...HK", (2, 3), name="up")(x)
        return Einsum("...HK,HKD->...D", (5,), use_bias=False, name="down")(y)


def both(quantised, x, zero):
    """Rounded floats, and the model of packed kernels with its variables."""
    floats = Intercepted(Two(), (quantised,))
    variables = floats.init(KEY, x)

    def fill(path, value):
        drawn = jax.random.uniform(KEY, value.shape)
        return 0.05 + 0.02 * drawn if path[-1].key == "scale" else zero + jnp.round(2 * drawn)

    filled = jax.tree_util.tree_map_with_path(fill, variables[COLLECTION])
    variables = {"params": variables["params"], COLLECTION: filled}
    packed = pack_kernels(variables, quantised)
    assert has_packed(packed["params"])
    return floats.apply(variables, x), QuantizedModel(Two(), quantised), packed


@pytest.mark.parametrize("bits", [3, 8])
@pytest.mark.parametrize("kinds", [(Uniform, Uniform), (Symmetric, Uniform), (Symmetric,) * 2])
@pytest.mark.parametrize("per", ["channel", "tensor"])
def test_integers_are_what_rounded_floats_are(bits, kinds, per):
    quantised = rules(*(kind(bits) for kind in kinds), per=per)
    x = jax.random.normal(KEY, (3, 7, 4))
    floats, model, packed = both(quantised, x, zero=2.0 ** (bits - 1))
    assert float(jnp.abs(floats).max()) > 0
    np.testing.assert_allclose(model.apply(packed, x), floats, rtol=1e-5, atol=1e-6)
    products = [
        line
        for line in jax.jit(model.apply).lower(packed, x).as_text().splitlines()
        if "dot_general" in line
    ]
    assert len(products) == 2 and all(line.count("xi8>") == 2 for line in products)


def test_a_zero_point_between_codes_moves_what_is_clipped_by_less_than_a_step():
    x = jnp.linspace(-3, 3, 101)
    quantizer, state = Uniform(4), {"scale": jnp.array([0.1]), "zero": jnp.array([7.4])}
    found = codes(quantizer, x, state)
    value = (found.code + found.offset) * found.scale
    plain = quantizer(x, **state)
    inside = (x > -0.6) & (x < 0.6)
    np.testing.assert_allclose(value[inside], plain[inside], rtol=1e-6)
    assert 0 < float(jnp.abs(value - plain).max()) < 0.1


@pytest.mark.parametrize("of_input", [Uniform(9), Log(4), None])
def test_inputs_without_such_codes_are_floats(of_input):
    quantised = rules(of_input, Uniform(4))
    x = jax.random.uniform(KEY, (3, 4))
    floats, model, packed = both(quantised, x, zero=8.0)
    np.testing.assert_allclose(model.apply(packed, x), floats, rtol=1e-6, atol=1e-7)
    assert "xi8>" not in jax.jit(model.apply).lower(packed, x).as_text()


def test_which_maps_have_integers():
    assert in_integers("...D,DHK->...HK", Rule("", Uniform(8)))
    assert not in_integers("...HD,HDK->...HK", Rule("", Uniform(8)))
    assert not in_integers("...D,DHK->...HK", Rule("", Uniform(8), per="channel"))
    assert not in_integers("...D,DHK->...HK", None)
