"""Calibration layer by layer: what is seen, where it lies, and that the function stays."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.compress.calibration import CalibrationUpdate, opened, quantized_task
from jaxformer.compress.outliers import at_norms
from jaxformer.compress.procedures import MinMax, RepQ, repq_rules, uniform_rules
from jaxformer.compress.quantized import COLLECTION, Quantized, Rule
from jaxformer.compress.quantizers import Uniform
from jaxformer.compress.reparameterize import collapse, reparameterized
from jaxformer.compress.walk import walk
from jaxformer.data.base import IndexedData
from jaxformer.data.sources.image import digits
from jaxformer.models.transformer import Transformer
from jaxformer.models.vit import vit
from jaxformer.recipe import ConfigError, TrainState
from jaxformer.tasks.classify import ClassifyTask

KEY = jax.random.key(0)
DATA = IndexedData(digits("train"), 12, 0)


def parts(**options):
    trunk = Transformer(width=16, depth=2, heads=2, hidden=24, **options)
    task = ClassifyTask(vit(trunk, image_size=8, patch=2, classes=10))
    batch = DATA.batch(0)
    params, extra = task.init(KEY, batch)
    # Biases and gains that are not trivial.
    params = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(KEY, x.shape), params)
    return task, params, extra, batch


def calibrated(rules, procedure):
    task, params, extra, batch = parts()
    update = CalibrationUpdate(task, rules, DATA, procedure)
    start = TrainState(jnp.int32(0), params, extra, {}, KEY)
    begun = update.init(start)
    state, _ = update(begun, batch)
    assert jax.tree.structure(state) == jax.tree.structure(begun)
    shapes = [[x.shape for x in jax.tree.leaves(s.extra)] for s in (begun, state)]
    assert shapes[0] == shapes[1]
    return task, params, state, batch


def test_many_bits_change_nothing():
    rules = uniform_rules(16, 16)
    task, params, state, batch = calibrated(rules, MinMax)
    plain = task.predict(params, {}, batch, key=KEY)
    found = quantized_task(task, rules).predict(state.params, state.extra, batch, key=KEY)
    np.testing.assert_allclose(found, plain, atol=2e-2)  # patches have 8 bits
    few = uniform_rules(3, 3)
    task, _, state, batch = calibrated(few, MinMax)
    coarse = quantized_task(task, few).predict(state.params, state.extra, batch, key=KEY)
    assert jnp.abs(coarse - plain).max() > 0.05


def test_rules_that_quantise_nothing_leave_the_model_bit_by_bit():
    task, params, extra, batch = parts()
    nothing = quantized_task(task, Quantized((Rule("", None),)))
    same = nothing.predict(params, extra, batch, key=KEY)
    np.testing.assert_array_equal(same, opened(task).predict(params, extra, batch, key=KEY))


def test_states_lie_at_their_modules_with_the_shapes_that_rules_say():
    rules = Quantized(
        (Rule(r"/kernel$", Uniform(4), per="channel"), Rule(r"/value$", Uniform(4), per="head"))
    )

    class Own(MinMax):
        def linear(self, layer):
            return {"kernel": super_state(layer.kernel_IxO)}

        def mix(self, product):
            return {"value": head_state(product.right)}

    def super_state(kernel):
        return {"scale": kernel.max(0), "zero": jnp.zeros(kernel.shape[1])}

    def head_state(v):
        return {"scale": v.max((0, 1, 3)), "zero": jnp.zeros(v.shape[2])}

    task, params, _, batch = parts()
    states = walk(
        lambda: opened(task).predict(params, {}, batch, key=KEY), params, rules, Own(params)
    )
    block = states["encoder"]["stack"]["block_1"]
    kernel = params["encoder"]["stack"]["block_1"]["mixer"]["key"]["kernel"]
    np.testing.assert_allclose(
        block["mixer"]["key"]["kernel"]["scale"], kernel.max(0, keepdims=True)
    )
    assert block["mixer"]["out"]["kernel"]["scale"].shape == (1, 1, 16)
    assert block["mixer"]["core"]["mix"]["value"]["scale"].shape == (1, 1, 2, 1)
    assert "input" not in block["mlp"]["up"]


@pytest.mark.parametrize("statistic", [jnp.mean, jnp.median], ids=["mean", "median"])
def test_channels_share_a_scale_and_the_function_stays(statistic):
    rules = repq_rules(8, 8)
    procedure = functools.partial(RepQ, statistic=statistic)
    task, params, state, batch = calibrated(rules, procedure)
    plain = task.predict(params, {}, batch, key=KEY)
    np.testing.assert_allclose(task.predict(state.params, {}, batch, key=KEY), plain, atol=1e-4)
    stacks = [p["encoder"]["stack"]["block_0"]["mixer_residual"] for p in (params, state.params)]
    assert not np.allclose(stacks[0]["norm"]["scale"], stacks[1]["norm"]["scale"])


def test_which_scale_is_shared_makes_no_difference_to_codes():
    """x_c / r_c by s is x_c by s_c whatever s is: the statistic of scales cancels."""
    x = jax.random.normal(KEY, (50, 6)) * jnp.array([1, 1, 1, 1, 20, 0.1])
    scale, zero = jnp.array([0.4, 0.3, 0.4, 0.5, 8.0, 0.03]), jnp.array([7.0, 8, 7, 9, 8, 6])
    codes = []
    for shared in (scale.mean(), jnp.median(scale), scale.max()):
        change = collapse(scale, zero, shared, 8.0)
        moved = x / change.factor_I - change.shift_I
        codes.append(Uniform(4).encode(moved, change.scale, change.zero))
    alone = Uniform(4).encode(x, scale, zero)
    for found in codes:
        # A value on the edge of a step may fall to either side.
        assert jnp.mean(found == alone) > 0.99


def test_outliers_and_their_removal_undo_each_other():
    _, params, _, _ = parts()
    block = ("encoder", "stack", "block_0")
    grown = at_norms(params, (3,), 20.0)
    factor = jnp.ones(16).at[3].set(20.0)
    change = collapse(factor, jnp.zeros(16), 1.0, 0.0)
    linears = tuple((*block, "mixer", name) for name in ("query", "key", "value"))
    back = reparameterized(grown, (*block, "mixer_residual", "norm"), linears, change)
    for name in ("mixer", "mixer_residual"):
        pair = [p["encoder"]["stack"]["block_0"][name] for p in (back, params)]
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), *pair)


def test_what_cannot_be_calibrated_is_refused():
    task, params, extra, batch = parts()
    rules = uniform_rules(4, 4)
    with pytest.raises(ConfigError, match=r"projection/input: is not calibrated"):
        quantized_task(task, rules).predict(params, extra, batch, key=KEY)
    scanned, params, _, _ = parts(scan=True)
    with pytest.raises(ConfigError, match=r"inside a loop over layers; set model.scan=False"):
        walk(
            lambda: opened(scanned).predict(params, {}, batch, key=KEY),
            params,
            rules,
            MinMax(params),
        )


def test_states_are_saved_like_any_other(tmp_path):
    from jaxformer.train.checkpoint import Checkpoints

    _, _, state, _ = calibrated(uniform_rules(4, 4), MinMax)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {"phase": "calibrate", "config": {}})
    with Checkpoints(tmp_path) as checkpoints:
        again = checkpoints.restore(1, jax.tree.map(jnp.zeros_like, state))
    pair = (state.extra[COLLECTION], again.extra[COLLECTION])
    jax.tree.map(np.testing.assert_array_equal, *pair)
