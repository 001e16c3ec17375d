"""Blocks that learn their rounding: less error, weights on the grid, and a run like any other."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import jaxformer
from jaxformer import paths
from jaxformer.compress import reconstruction
from jaxformer.compress.calibration import CalibrationUpdate, completed, opened, quantized_task
from jaxformer.compress.intercepted import Intercepted
from jaxformer.compress.packed import Packed
from jaxformer.compress.procedures import MinMax, uniform_rules
from jaxformer.compress.quantized import COLLECTION, Quantized, Rule
from jaxformer.compress.quantizers import Shifted, Symmetric, Uniform, smooth
from jaxformer.compress.reconstruction import (
    BLOCKS,
    Reconstruction,
    divergence,
    mean_error,
    pressure,
    reconstruct,
    summed_error,
)
from jaxformer.data.base import IndexedData
from jaxformer.data.sources.image import digits
from jaxformer.evaluation.evaluators import MeanEvaluator
from jaxformer.models.swin import swin
from jaxformer.observe.metrics import read_jsonl
from jaxformer.papers import adalog, dopq_vit
from jaxformer.papers.adalog.model import AdaLog, SmoothAdaLog
from jaxformer.parallel.mesh import make_mesh
from jaxformer.recipe import ConfigError, EvalContext, TrainState
from jaxformer.tasks.classify import ClassifyTask
from jaxformer.train.fit import FitOptions, fit
from jaxformer.train.states import restore

KEY = jax.random.key(0)
STEPS = 200
W3A3 = {"bits__weights": 3, "bits__activations": 3}
RECONSTRUCT = {"reconstruct__steps": 100, "reconstruct__images": 128}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A small ViT of digits to its end: (recipe, folder, states after both phases)."""
    workdir = tmp_path_factory.mktemp("run") / "run"
    options = {"steps": STEPS, "evaluate__batches": 0, "outliers__channels": 2}
    recipe = jaxformer.load("adalog:tiny", **options, **W3A3, **RECONSTRUCT)
    last = fit(recipe, workdir=workdir, options=FitOptions(keep=None, progress=False))
    calibrated = restore(recipe, workdir, step=STEPS + 1)
    return recipe, workdir, calibrated, last


def float_task(recipe):
    return recipe.task.stages[0]


def watched(task, params, extra, batch, feed=None):
    """What each block reads and gives, by name; it is fed with other inputs if they are given."""
    read, given = {}, {}

    def watch(method, args, kwargs, context):
        name = "/".join(context.module.path)
        if context.method_name != "__call__" or not re.search(BLOCKS, name):
            return method(*args, **kwargs)
        args = args if feed is None else (feed[name], *args[1:])
        read[name], given[name] = args[0], method(*args, **kwargs)
        return given[name]

    with nn.intercept_methods(watch):
        task.predict(params, extra, batch, key=KEY)
    return read, given


def test_every_block_errs_less(run):
    """On what it was trained on, fed with float inputs, by other code than it was trained with."""
    recipe, _, calibrated, last = run
    batch = recipe.phases[-1].data.batch(0)
    task, quantised = opened(float_task(recipe)), recipe.task.stages[1]
    read, wanted = watched(task, calibrated.params, {}, batch)
    assert list(read) == ["encoder/embed", *(f"encoder/stack/block_{i}" for i in (0, 1)), "head"]
    errors = [
        {
            name: float((divergence if name == "head" else mean_error)(y, wanted[name]))
            for name, y in watched(quantised, s.params, s.extra, batch, read)[1].items()
        }
        for s in (calibrated, last)
    ]
    before, after = errors
    assert all(after[name] <= before[name] for name in before), errors
    for name in [name for name in before if "block" in name]:
        assert after[name] < 0.95 * before[name], errors


def test_weights_are_steps_next_to_the_float_ones(run):
    _, _, calibrated, last = run
    before, after = paths.leaves(calibrated.params), paths.leaves(last.params)
    old, new = (paths.leaves(s.extra[COLLECTION]) for s in (calibrated, last))
    moved = 0
    for name in before:
        if f"{name}/scale" not in old:
            np.testing.assert_array_equal(after[name], before[name])  # norms, biases, tokens
            continue
        for part in ("scale", "zero"):
            np.testing.assert_array_equal(new[f"{name}/{part}"], old[f"{name}/{part}"])
        if (after[name] == before[name]).all():
            assert "block" not in name  # the others may have been left as they were
            continue
        steps, own = (x[name] / old[f"{name}/scale"] for x in (after, before))
        np.testing.assert_allclose(steps, jnp.round(steps), atol=1e-4)
        assert jnp.abs(jnp.round(steps) - own).max() <= 1 + 1e-4
        moved += int((jnp.round(steps) != jnp.round(own)).sum())
    assert moved > 100  # to the farther neighbour
    scales = [n for n in old if n.endswith("/scale") and "kernel" not in n]
    assert all((new[n] > 0).all() for n in scales)
    assert all((new[n] != old[n]).any() for n in scales if "block" in n)
    assert all((new[n] == old[n]).all() for n in old if not n.endswith("/scale"))


def test_a_run_is_restored_and_evaluated_as_it_was(run):
    recipe, workdir, _, last = run
    again = restore(recipe, workdir)
    same = jax.tree.map(np.array_equal, again.replace(key=0), last.replace(key=0))
    assert all(jax.tree.leaves(same))
    (evaluator,) = recipe.evaluators
    assert isinstance(evaluator, MeanEvaluator)
    mesh = make_mesh()
    with jax.set_mesh(mesh):
        found = evaluator(again, EvalContext(mesh, "test"))
    rows = [row for row in read_jsonl(workdir / "metrics.jsonl") if "test/accuracy" in row]
    rows = {row["phase"]: row for row in rows}
    assert found["accuracy"] == rows["reconstruct"]["test/accuracy"]
    assert found["loss"] == rows["reconstruct"]["test/loss"]
    # What the reconstruction is for; .9 of the digits are known in floats.
    assert rows["train"]["test/accuracy"] > 0.8
    assert rows["reconstruct"]["test/accuracy"] >= rows["calibrate"]["test/accuracy"]
    assert rows["reconstruct"]["test/loss"] < rows["calibrate"]["test/loss"]


def test_no_steps_are_calibration_alone(run):
    """There is no phase; and what the phase would do rounds to the nearest."""
    recipe, _, calibrated, _ = run
    plain = jaxformer.load("adalog:tiny", **W3A3)
    assert [phase.name for phase in plain.phases] == ["train", "outliers", "calibrate"]
    batch = recipe.phases[-1].data.batch(0)
    rules, how = recipe.phases[-1].update.rules, Reconstruction(steps=0)
    params, states, _ = reconstruct(
        float_task(recipe), rules, how, calibrated.params, calibrated.extra, batch, KEY
    )
    jax.tree.map(np.testing.assert_array_equal, states, calibrated.extra[COLLECTION])
    named, old, new = (paths.leaves(x) for x in (states, calibrated.params, params))
    for name in [name for name in old if f"{name}/scale" in named]:
        steps = old[name] / named[f"{name}/scale"]
        state = {part: named[f"{name}/{part}"] for part in ("scale", "zero")}
        same = Uniform(3)(old[name], **state) == Uniform(3)(new[name], **state)
        # Halves, which the end of a range may be, are rounded up, not to even.
        assert jnp.all(same | (jnp.abs(steps - jnp.floor(steps) - 0.5) < 1e-4)), name


def test_the_pressure_begins_after_a_fifth_and_sharpens():
    found = [tuple(float(x) for x in pressure(step, 1000)) for step in (0, 199, 200, 600, 1000)]
    weights, sharpness = zip(*found, strict=True)
    np.testing.assert_allclose(weights, [0, 0, 0.01, 0.01, 0.01])
    np.testing.assert_allclose(sharpness[2:], [20, 11, 2], rtol=1e-6)


def test_losses_are_those_of_the_paper():
    y, t = jax.random.normal(KEY, (2, 4, 3, 5))
    np.testing.assert_allclose(summed_error(y, t), ((y - t) ** 2).sum() / (4 * 5) / 10, rtol=1e-5)
    np.testing.assert_allclose(mean_error(y, t), ((y - t) ** 2).sum() / 60, rtol=1e-5)
    p, q = jax.nn.softmax(t), jax.nn.softmax(y)
    np.testing.assert_allclose(divergence(y, t), (p * jnp.log(p / q)).sum() / 12, rtol=1e-4)
    assert divergence(t, t + 3.0) == pytest.approx(0, abs=1e-6)


def test_adalog_is_trained_without_its_table():
    q = smooth(Shifted(AdaLog(3), 0.17))
    assert isinstance(q, Shifted) and isinstance(q.inner, SmoothAdaLog)
    assert smooth(Uniform(3)) == Uniform(3)
    ruled = adalog.model.rules(3, 3).smooth().named("encoder/stack/block_0/mlp/down/input")
    assert ruled.quantizer == Shifted(SmoothAdaLog(3), adalog.model.GELU_SHIFT)


def test_mixed_inputs_are_those_of_the_quantised_blocks_before(run, monkeypatch):
    """And blocks that are alike are one program."""
    recipe, _, calibrated, _ = run
    task, batch = float_task(recipe), recipe.phases[-1].data.batch(0)
    seen, blocks = {}, []

    def record(block, how, variables, float_x, quantised_x, wanted, key):
        blocks.append(block)
        seen[len(seen)] = float_x, quantised_x, wanted
        return variables

    monkeypatch.setattr(reconstruction, "trained", record)
    rules, how = recipe.phases[-1].update.rules, Reconstruction(float_share=0.5)
    state = calibrated.params, calibrated.extra, batch
    _, _, metrics = reconstruct(task, rules, how, *state, KEY)
    read, given = watched(opened(task), calibrated.params, {}, batch)
    quantised, _ = watched(quantized_task(task, rules), *state)
    assert len(seen) == len(read) == 4
    for found, name in zip(seen.values(), read, strict=True):
        for x, wanted in zip(found, (read[name], quantised[name], given[name]), strict=True):
            np.testing.assert_allclose(x, wanted, rtol=1e-3, atol=1e-4)
    assert not np.allclose(seen[2][0], seen[2][1])
    assert blocks[1] == blocks[2] and hash(blocks[1]) == hash(blocks[2])
    errors = [metrics[f"error_{name}"].value() for name in ("calibrated", "reconstructed")]
    assert errors[0] == errors[1]  # nothing was trained


def test_mixing_is_by_element_and_share():
    """Trained on quantised inputs alone a block makes up for them, on float ones it does not."""
    block, variables, x, wanted = one_map()
    other = x + 0.5  # what quantised blocks gave is too large by as much in every channel
    errors = {}
    for share in (0.0, 0.5, 1.0):
        how = Reconstruction.of(300, float_share=share, rate=3e-2)
        new = reconstruction.trained(block, how, variables, x, other, wanted, KEY)
        errors[share] = float(jnp.square(block(new, other, block.rules) - wanted).mean())
    assert errors[0.0] < errors[0.5] < errors[1.0], errors


def one_map():
    """A linear map of 3 bits as a block: itself, its variables, inputs and outputs."""
    from jaxformer.compress.observers import min_max
    from jaxformer.nn.einsum import Einsum

    module = Einsum("...D,DF->...F", (8,))
    x = jax.random.normal(KEY, (64, 16))
    params = module.init(KEY, x)["params"]
    states = {"kernel": min_max(3, params["kernel"], (0,))}
    rules = Quantized((Rule("^kernel$", Uniform(3), per="channel"),))
    block = reconstruction.Block(module, (), (), rules, mean_error)
    variables = {"params": params, COLLECTION: states}
    return block, variables, x, block(variables, x, None)


def test_compress_offers_it_and_packs_what_it_left(run):
    recipe, _, _, _ = run
    task, batch = float_task(recipe), recipe.phases[-1].data.batch(0)
    params = restore(recipe, run[1], step=STEPS).params
    wanted = task.predict(params, {}, batch, key=KEY)
    errors = {}
    for argument in ("w3a3", "w3a3r60"):
        method = dopq_vit.compressor(argument)
        new, extra, found = method.find(task, params, {}, batch)
        kernel = new["encoder"]["stack"]["block_0"]["mlp"]["up"]["kernel"]
        assert isinstance(kernel, Packed) and kernel.codes.bits == 3
        answer = method.task(task, found).predict(new, extra, batch, key=KEY)
        errors[argument] = float(jnp.square(answer - wanted).mean())
    assert errors["w3a3r60"] < 0.9 * errors["w3a3"], errors
    for argument in ("w3a3r", "w3a3r2x", "r200"):
        with pytest.raises(ConfigError, match=r"must read like w4a4"):
            adalog.compressor(argument)
        with pytest.raises(ConfigError, match=r"must read like w4a4"):
            dopq_vit.compressor(argument)


def test_swin_is_reconstructed_merges_included():
    data = IndexedData(digits("train"), 16, 0)
    task, batch = (
        ClassifyTask(
            swin(image_size=8, patch=2, width=8, depths=(1, 1), heads=(2, 2), window=2, classes=10)
        ),
        data.batch(0),
    )
    params, _ = task.init(KEY, batch)
    rules = uniform_rules(3, 8)
    update = CalibrationUpdate(task, rules, data, MinMax)
    state, _ = update(update.init(TrainState(jnp.int32(0), params, {}, {}, KEY)), batch)
    how = Reconstruction.of(100, loss=mean_error, head_loss=mean_error)
    new, states, metrics = reconstruct(task, rules, how, state.params, state.extra, batch, KEY)
    assert jax.tree.structure((new, states)) == jax.tree.structure(
        (state.params, state.extra[COLLECTION])
    )
    named, scales = paths.leaves(new), paths.leaves(states)
    old = paths.leaves(state.params)
    trained = [n for n in named if n.endswith("kernel") and (named[n] != old[n]).any()]
    assert "encoder/merge_1/reduction/kernel" in trained and len(trained) > 10
    for name in trained:
        steps = named[name] / scales[f"{name}/scale"]
        np.testing.assert_allclose(steps, jnp.round(steps), atol=1e-4, err_msg=name)
    before, after = (metrics[f"error_{name}"].value() for name in ("calibrated", "reconstructed"))
    assert after < 0.8 * before
    assert completed(opened(task), new, batch) is new


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: load(reconstruct__steps=-1), r"reconstruct.steps=-1: must be at least 0"),
        (lambda: load(reconstruct__batch_size=0), r"reconstruct.batch_size=0: must be at least 1"),
        (lambda: Reconstruction(rate=-0.1), r"reconstruct.rate=-0.1: must be at least 0"),
        (lambda: load(reconstruct__float_share=1.5), r"float_share=1.5: must be from 0, inputs"),
        (lambda: load(reconstruct__float_share=float("nan")), r"float_share=nan: must be from 0"),
        (
            lambda: load(reconstruct__steps=1, reconstruct__images=0),
            r"reconstruct.images=0: give at least one",
        ),
    ],
)
def test_bad_settings_are_named(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def load(**fields):
    return jaxformer.load("dopq_vit:tiny", **fields)


def test_what_cannot_be_reconstructed_is_refused(run):
    recipe, _, calibrated, _ = run
    task, batch = float_task(recipe), recipe.phases[-1].data.batch(0)
    how, state = Reconstruction(steps=1), (calibrated.params, calibrated.extra, batch, KEY)
    rules = recipe.phases[-1].update.rules
    wrapped = dataclasses.replace(task, model=Intercepted(task.model, ()))
    with pytest.raises(ConfigError, match=r"that another method has changed cannot be run"):
        reconstruct(wrapped, rules, how, *state)
    with pytest.raises(ConfigError, match=r"the model has no quantised blocks; give 0"):
        reconstruct(task, rules, how, calibrated.params, {COLLECTION: {}}, batch, KEY)
    symmetric = Quantized((Rule(r"/kernel$", Symmetric(3), per="channel"), *rules.rules))
    with pytest.raises(ConfigError, match=r"kernel is quantised by Symmetric, whose rounding"):
        reconstruct(task, symmetric, how, *state)


def test_dopq_mixes_inputs_by_halves_and_takes_mean_errors():
    update = load(reconstruct__steps=7).phases[-1].update
    wanted = {"steps": 7, "float_share": 0.5, "loss": mean_error, "head_loss": mean_error}
    assert {name: getattr(update.how, name) for name in wanted} == wanted
    how = jaxformer.load("adalog:paper", init_from="", steps=1).phases[-1].update.how
    assert how == Reconstruction(20_000, 32, 1e-3, 4e-5, 1.0, summed_error, divergence)
