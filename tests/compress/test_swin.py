"""Swin in calibration: windows and merged patches take part in the surgery, and in all else."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer import paths
from jaxformer.compress.calibration import CalibrationUpdate, quantized_task
from jaxformer.compress.compressor import check_fits
from jaxformer.compress.outliers import at_norms
from jaxformer.compress.procedures import MinMax, RepQ, repq_rules, uniform_rules
from jaxformer.compress.quantized import COLLECTION
from jaxformer.data.base import IndexedData
from jaxformer.data.sources.image import digits
from jaxformer.models.swin import swin
from jaxformer.papers import adalog, dopq_vit, noisyquant
from jaxformer.papers.adalog.model import rules as adalog_rules
from jaxformer.papers.adalog.search import AdaLogSearch
from jaxformer.papers.dopq_vit.model import rules as dopq_rules
from jaxformer.papers.dopq_vit.recipe import Procedure
from jaxformer.papers.noisyquant.model import NoisyQuant
from jaxformer.papers.noisyquant.model import rules as noisy_rules
from jaxformer.recipe import TrainState
from jaxformer.tasks.classify import ClassifyTask

KEY = jax.random.key(0)
DATA = IndexedData(digits("train"), 8, 0)
METHODS = {"repq": (repq_rules(8, 8), RepQ), "adalog": (adalog_rules(8, 8), AdaLogSearch)}


@functools.cache
def parts(window=2):
    """Two stages, the first with shifted windows of 2 on a grid of 4; 3 does not divide it."""
    model = swin(
        image_size=8, patch=2, width=8, depths=(2, 1), heads=(2, 2), window=window, classes=10
    )
    task, batch = ClassifyTask(model), DATA.batch(0)
    params, _ = task.init(KEY, batch)
    # Biases and gains that are not trivial.
    params = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(KEY, x.shape), params)
    return task, params, batch


def with_outliers(params):
    """Large channels in all norms that feed maps, of the same function."""
    params = at_norms(params, (1, 5), 20.0)
    merge = params["encoder"]["merge_1"]
    gain = jnp.ones(32).at[jnp.array([0, 31])].set(20.0)
    norm = jax.tree.map(lambda x: x * gain, merge["norm"])
    kernel = merge["reduction"]["kernel"] / gain[:, None]
    merge = {"norm": norm, "reduction": {"kernel": kernel}}
    return {**params, "encoder": {**params["encoder"], "merge_1": merge}}


def calibrated(rules, procedure, params=None, window=2):
    task, own, batch = parts(window)
    update = CalibrationUpdate(task, rules, DATA, procedure)
    params = own if params is None else params
    begun = update.init(TrainState(jnp.int32(0), params, {}, {}, KEY))
    state, _ = update(begun, batch)
    assert jax.tree.structure(state) == jax.tree.structure(begun)
    return task, state, batch


def moved(before, after):
    """Names of the norms that surgery has changed."""
    before, after = paths.leaves(before), paths.leaves(after)
    return {n for n, x in before.items() if n.endswith("norm/scale") and (after[n] != x).any()}


@pytest.mark.parametrize("grown", [False, True], ids=["plain", "outliers"])
@pytest.mark.parametrize("method", METHODS)
def test_every_norm_before_a_map_changes_and_the_function_stays(method, grown):
    rules, procedure = METHODS[method]
    task, params, batch = parts()
    plain = task.predict(params, {}, batch, key=KEY)
    params = with_outliers(params) if grown else params
    _, state, _ = calibrated(rules, procedure, params)
    # The biases that merges got are read by the opened model alone.
    same = quantized_task(task, rules.without(""))
    np.testing.assert_allclose(same.predict(state.params, {}, batch, key=KEY), plain, atol=1e-4)
    names = {n.removesuffix("/scale") for n in moved(params, state.params)}
    blocks = ("encoder/stage_0/block_0", "encoder/stage_0/block_1", "encoder/stage_1/block_0")
    wanted = {f"{b}/{part}_residual/norm" for b in blocks for part in ("mixer", "mlp")}
    assert names == wanted | {"encoder/merge_1/norm"}
    assert (state.params["encoder"]["merge_1"]["reduction"]["bias"] != 0).any()


def test_windows_that_are_padded_keep_their_norm():
    """They read zeros beside it; the other norms still change."""
    task, params, batch = parts(3)
    plain = task.predict(params, {}, batch, key=KEY)
    rules, procedure = METHODS["repq"]
    _, state, _ = calibrated(rules, procedure, params, 3)
    same = quantized_task(task, rules.without(""))
    np.testing.assert_allclose(same.predict(state.params, {}, batch, key=KEY), plain, atol=1e-4)
    names = moved(params, state.params)
    assert "encoder/stage_0/block_0/mlp_residual/norm/scale" in names
    assert "encoder/stage_0/block_0/mixer_residual/norm/scale" not in names


@pytest.mark.parametrize(
    ("rules", "procedure"),
    [
        (uniform_rules(16, 16), MinMax),
        (dopq_rules(16, 16), Procedure(refit=True)),
        (noisy_rules(16, 16), NoisyQuant),
    ],
    ids=["min-max", "dopq_vit", "noisyquant"],
)
def test_many_bits_change_nothing(rules, procedure):
    task, state, batch = calibrated(rules, procedure, with_outliers(parts()[1]))
    plain = task.predict(parts()[1], {}, batch, key=KEY)
    found = quantized_task(task, rules).predict(state.params, state.extra, batch, key=KEY)
    np.testing.assert_allclose(found, plain, atol=2e-2 * float(jnp.abs(plain).max()))


# AdaLog's bases are never finer than 2^(10/37), however many bits there are.
@pytest.mark.parametrize(
    ("paper", "most"),
    [(adalog, 0.1), (dopq_vit, 1e-3), (noisyquant, 1e-3)],
    ids=["adalog", "dopq_vit", "noisyquant"],
)
def test_papers_compress_all_of_it(paper, most):
    """Merges included, with their weights packed; at 8 bits it answers about as before."""
    task, params, batch = parts()
    plain = task.predict(params, {}, batch, key=KEY)
    compressor = paper.compressor("w8a8")
    new, extra, found = compressor.find(task, params, {}, batch)
    small = compressor.task(task, found)
    check_fits(small, new, extra, batch)
    error = jnp.square(small.predict(new, extra, batch, key=KEY) - plain).mean()
    assert 0 < error < most * plain.var()
    merge = extra[COLLECTION]["encoder"]["merge_1"]["reduction"]
    assert set(merge) == {"input"} and new["encoder"]["merge_1"]["reduction"]["kernel"].codes
