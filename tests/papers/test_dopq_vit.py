"""DopQ-ViT: what must hold exactly."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxformer
from jaxformer.compress.synthetic import attention, output_error
from jaxformer.papers.dopq_vit.model import (
    FORMS,
    STATISTICS,
    STEEPEST,
    Arctan,
    EitherTan,
    SymmetricTan,
    medoid,
    search_tan,
    table,
)
from jaxformer.recipe import ConfigError

KEY = jax.random.key(0)
A = jnp.linspace(0, 1, 2001)


@pytest.mark.parametrize("form", [SymmetricTan, Arctan])
@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("sharpness", [0.5, 2.5])
def test_ends_stay_and_values_are_few_and_ordered(form, bits, sharpness):
    quantizer, scale = form(bits), 0.8
    y = quantizer(A, scale, sharpness)
    np.testing.assert_allclose([y[0], quantizer(scale, scale, sharpness)], [0, scale], atol=1e-6)
    assert jnp.all(jnp.diff(y) >= -1e-7)
    levels = np.unique(np.asarray(quantizer.encode(A, scale, sharpness)))
    assert len(levels) <= 2**bits
    np.testing.assert_allclose(quantizer(y, scale, sharpness), y, atol=1e-6)
    by_table = table(quantizer, scale, sharpness)
    np.testing.assert_array_equal(by_table[quantizer.encode(A, scale, sharpness).astype(int)], y)


@pytest.mark.parametrize("form", [SymmetricTan, Arctan])
def test_a_flat_tangent_is_uniform(form):
    y = form(4)(A, 1.0, 1e-3)
    uniform = jnp.round(A * 15) / 15
    # A value on the edge of a step may fall to either side.
    assert jnp.mean(jnp.abs(y - uniform) < 1e-5) > 0.999


def test_the_symmetric_form_is_dense_at_both_ends():
    levels = table(SymmetricTan(4), 1.0, 2.5)
    steps = jnp.diff(levels)
    assert steps[-1] < steps[7]
    assert steps[0] < steps[7]


def test_either_form_is_the_better_of_both():
    p, v = attention(0)
    errors = {}
    for name, form in FORMS.items():
        quantizer = form(3)
        state = search_tan(quantizer, p, v, v)
        errors[name] = output_error(quantizer(p, **state), p, v)
    np.testing.assert_allclose(errors["auto"], min(errors["sym"], errors["atan"]), rtol=1e-5)
    gradient = jax.grad(lambda p: EitherTan(3)(p, 1.0, 10.0, 1.0).sum())(p)
    assert jnp.all(jnp.isfinite(gradient))


def test_statistics_of_channels():
    scales = jax.random.uniform(KEY, (65,))
    grown = scales.at[:20].mul(1e6)
    assert STATISTICS["median"](grown) < 1.01
    assert STATISTICS["mean"](grown) > 1e4
    even = scales[:64]
    distances = [float(jnp.abs(even - s).mean()) for s in even]
    # The two in the middle are equally far from all, up to rounding.
    assert jnp.abs(even - medoid(even)).mean() == pytest.approx(min(distances), rel=1e-6)
    assert medoid(even) in jnp.sort(even)[31:33]
    assert medoid(scales) == jnp.median(scales)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: table(SymmetricTan(4), 1.0, 3.2), rf"sharpness=3.2: .* at most {STEEPEST:.4g}"),
        (lambda: table(Arctan(4), 1.0, 0.0), r"sharpness=0.0: must be above 0"),
        (
            lambda: search_tan(SymmetricTan(4), A[None, None] + 1, A[:, None], A[:, None]),
            r"probabilities: lie in \[1, 2\]; must be in \[0, 1\]",
        ),
        (lambda: load(model__statistic="max"), r"'max': must be one of mean, median, mad, search"),
        (lambda: load(model__form="log"), r"model.form='log': must be one of sym, atan, auto"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def load(**fields):
    return jaxformer.load("dopq_vit:tiny", **fields)
