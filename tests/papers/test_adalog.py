"""AdaLog: what must hold exactly."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxformer
from jaxformer.compress.quantizers import GELU_SHIFT, Log, Shifted, Uniform
from jaxformer.compress.search import row_errors
from jaxformer.papers.adalog import search
from jaxformer.papers.adalog.model import AdaLog, R, folded_bias, rules
from jaxformer.papers.adalog.search import (
    MIXTURES,
    ROWS,
    fpcs,
    kernel_by_output,
    search_linear,
    search_log_linear,
    search_mix,
    search_scores,
    some,
    span,
    zeros_of,
)
from jaxformer.recipe import ConfigError

KEY = jax.random.key(0)
P = jax.nn.softmax(2.5 * jax.random.normal(KEY, (2, 2, 6, 6)))


def test_q_of_r_is_log2():
    quantizer = AdaLog(4)
    np.testing.assert_array_equal(quantizer(P, 1.0, float(R)), Log(4)(P, 1.0))
    _, mantissa = quantizer.table(jnp.arange(16.0), float(R))
    np.testing.assert_array_equal(mantissa, 1)


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("q", [10.0, 18.0, 37.0, 137.0])
def test_values_are_few_ordered_and_below_the_scale(bits, q):
    x = jnp.linspace(0, 1.2, 2001)
    y = AdaLog(bits)(x, 0.9, q)
    assert len(np.unique(y)) <= 2**bits + 1
    assert jnp.all(jnp.diff(y) >= 0)
    assert jnp.all(y <= 0.9)
    assert AdaLog(bits)(jnp.float32(0.9), 0.9, q) == jnp.float32(0.9)
    # 0 is taken for 1e-15 first: its code, where bits reach so far, stands for about that.
    zero = AdaLog(bits)(jnp.float32(0), 1.0, q)
    reached = round(49.83 * R / q) < 2**bits
    assert zero == 0 if not reached else 0 < zero < 1e-14


def test_shift_and_table_make_the_power():
    u, bits = jnp.arange(16.0), 4
    for q in (11.0, 25.0, 90.0):
        shift, mantissa = AdaLog(bits).table(u, q)
        most = 2 ** (bits + 1) - 2
        exact = 2.0 ** (-u * q / R + shift)
        assert jnp.abs(mantissa - exact).max() <= 1 / (2 * most) + 1e-6


def test_folding_the_shift_into_the_bias_changes_nothing():
    keys = jax.random.split(KEY, 3)
    x = jax.nn.gelu(jax.random.normal(keys[0], (30, 8)))
    kernel, bias = jax.random.normal(keys[1], (8, 5)), jax.random.normal(keys[2], (5,))
    state = {"scale": 2.0, "q": 22.0}
    before = Shifted(AdaLog(4), GELU_SHIFT)(x, **state) @ kernel + bias
    after = AdaLog(4)(x + GELU_SHIFT, **state) @ kernel + folded_bias(bias, kernel)
    np.testing.assert_allclose(after, before, atol=1e-5)


def test_the_search_is_no_worse_than_its_grid():
    x = jax.random.normal(KEY, (50, 3)) ** 3
    quantizer = Uniform(4)

    def errors(state):
        return jnp.square(quantizer(x, **state) - x).mean(0)

    low, high = span(x, 4, 0, 1e-4)
    zeros = zeros_of(4, True)
    found = errors(fpcs(errors, low, high, zeros))
    for zero in zeros:
        for scale in jnp.linspace(low, high, 8):
            assert jnp.all(found <= errors({"scale": scale, "zero": zero}) + 1e-6)


def test_searches_by_output_beat_searches_by_values():
    keys = jax.random.split(KEY, 2)
    x = jax.random.normal(keys[0], (60, 8)) * jnp.linspace(0.2, 3, 8)
    kernel, quantizer = jax.random.normal(keys[1], (8, 6)), Uniform(3)
    by_output = kernel_by_output(quantizer, x, x, kernel)

    def error(state):
        return row_errors(kernel.T, x.T, x.T)(quantizer(kernel, **state).T)

    own = fpcs(
        lambda s: jnp.square(quantizer(kernel, **s) - kernel).mean(0),
        *span(kernel, 3, 0, 1e-8),
        zeros_of(3, False),
    )
    assert jnp.all(error(by_output) <= error(own) * 1.001)
    found = search_linear(quantizer, quantizer, x, kernel)
    assert found["input"]["scale"].shape == (1,)
    assert found["kernel"]["zero"].shape == (6,)


def test_a_share_of_the_errors_tells_a_scale(monkeypatch):
    """Of rows, and of outputs; the error is that of all, against a search over all."""
    keys = jax.random.split(KEY, 2)
    x = jax.random.normal(keys[0], (3 * ROWS, 8)) * jnp.linspace(0.2, 3, 8)
    kernel, quantizer = jax.random.normal(keys[1], (8, 3 * MIXTURES)), Uniform(3)
    assert len(some(x)) == len(some(x[:ROWS])) == ROWS

    def error():
        found = search_linear.__wrapped__(quantizer, quantizer, x, kernel)
        y = quantizer(x, **found["input"]) @ quantizer(kernel, **found["kernel"])
        return jnp.square(y - x @ kernel).mean()

    few = error()
    monkeypatch.setattr(search, "ROWS", len(x))
    monkeypatch.setattr(search, "MIXTURES", 3 * MIXTURES)
    assert few <= 1.01 * error()


def test_products_of_attention_have_a_state_for_each_head():
    q, k = jax.random.normal(KEY, (2, 2, 6, 2, 4))
    found = search_scores(Uniform(4), Uniform(4), q * jnp.array([1, 30])[:, None], k)
    ratio = found["query"]["scale"][1] / found["query"]["scale"][0]
    assert 10 < ratio < 90
    mixed = search_mix(AdaLog(4), Uniform(4), P, k)
    assert 10 <= mixed["probabilities"]["q"][0] <= 137
    assert mixed["value"]["scale"].shape == (2,)


def test_values_after_gelu_have_a_base_and_a_scale():
    x = jax.nn.gelu(2 * jax.random.normal(KEY, (64, 8)))
    kernel = jax.random.normal(KEY, (8, 4))
    quantizer = Shifted(AdaLog(4), GELU_SHIFT)
    found = search_log_linear(Uniform(4), quantizer, x, kernel)["input"]
    plain = quantizer(x, scale=x.max() + GELU_SHIFT, q=37.0)
    error, before = (jnp.square((y - x) @ kernel).mean() for y in (quantizer(x, **found), plain))
    assert error < before


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: rules(1, 4), r"bits=1: must be from 2 to 8"),
        (lambda: rules(4, 9), r"bits=9: must be from 2 to 8"),
        (lambda: load(calibration__images=0), r"calibration.images=0: give at least one"),
        (lambda: load(model__scan=True), r"model.scan=True: layers are calibrated one by one"),
        (lambda: load(init_from="runs/x"), r"config.steps=40: the run init_from='runs/x'"),
        (lambda: load(data__size=12), r"data.size=12: the digits have 10 classes"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def load(**fields):
    return jaxformer.load("adalog:tiny", **fields)
