"""BCT: identities that must hold, and errors that must be clear of the whole encoder."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxformer
from jaxformer import paths
from jaxformer.compress import blocks
from jaxformer.compress.blocks import decompress, packed_bytes, unpack
from jaxformer.compress.matrix import as_matrix, from_matrix
from jaxformer.config import load_config
from jaxformer.models.encoder import token_classifier
from jaxformer.models.transformer import Transformer
from jaxformer.nn.attention import Fused, Unfused
from jaxformer.nn.block import stack_layers
from jaxformer.nn.make import swap
from jaxformer.observe.metrics import read_jsonl
from jaxformer.papers.bct import model
from jaxformer.papers.bct.model import (
    RANGES,
    Integer,
    Simulated,
    Static,
    compress_parameters,
    compressed,
    scheme,
)
from jaxformer.papers.bct.recipe import injection
from jaxformer.recipe import ConfigError
from jaxformer.train.fit import FitOptions, fit
from tests.papers import text_files

KEY = jax.random.key(0)
SMALL = {"weight_block": (16, 16), "value_block": 16}


def trunk(**fields):
    return Transformer(width=32, depth=2, heads=2, hidden=64, **fields)


@functools.cache
def encoder(**fields):
    """A model, parameters as of a trained one, tokens and which of them are there."""
    plain = token_classifier(trunk(**fields), vocabulary=20, length=12, classes=3)
    tokens = jax.random.randint(KEY, (8, 12), 0, 20)
    valid = jnp.arange(12) < jnp.asarray([12, 5, 9, 12, 7, 8, 3, 12])[:, None]
    params = plain.init(KEY, tokens, valid_BxL=valid)["params"]
    keys = iter(jax.random.split(KEY, 200))
    params = jax.tree.map(lambda x: x + 0.05 * jax.random.normal(next(keys), x.shape), params)
    return plain, params, tokens, valid


def logits(model, params, tokens, valid):
    return model.apply({"params": params}, tokens, valid_BxL=valid)


def test_off_is_the_float_model_to_the_bit():
    plain, params, tokens, valid = encoder()
    off = scheme("float")
    same = compress_parameters(params, off)
    jax.tree.map(np.testing.assert_array_equal, same, params)
    opened = swap(plain, Fused, Unfused)
    found = logits(compressed(plain, Simulated(off)), params, tokens, valid)
    np.testing.assert_array_equal(found, logits(opened, params, tokens, valid))


@pytest.mark.parametrize("order", ["pre", "post"])
def test_integers_and_rounded_floats_agree(order):
    plain, params, tokens, valid = encoder(order=order)
    how = scheme("int8", **SMALL)
    params = compress_parameters(params, how)
    floats = logits(compressed(plain, Simulated(how)), params, tokens, valid)
    integers = logits(compressed(plain, Integer(how)), params, tokens, valid)
    exact = logits(plain, params, tokens, valid)
    # Both are rounded, and alike: what they differ by is less than what rounding costs.
    scale = float(jnp.linalg.norm(exact))
    apart = float(jnp.linalg.norm(floats - integers)) / scale
    rounding = float(jnp.linalg.norm(floats - exact)) / scale
    assert 0 < rounding < 0.1
    assert apart < 0.02


def test_every_intermediate_lies_on_the_grid_of_its_block():
    """What modules hand on has at most 8 bits in every block of 16 features."""
    plain, params, tokens, valid = encoder()
    how = scheme("int8", **SMALL)
    params = compress_parameters(params, how)
    one = compressed(plain, Simulated(how))
    with one.active():
        _, seen = one.model.apply(
            {"params": params}, tokens, valid_BxL=valid, capture_intermediates=True
        )
    found = paths.leaves(seen["intermediates"])
    looked = 0
    parts = ("norm", "activation", "up", "down", "value", "out", "embed", "position", "pool")
    for name, y in found.items():
        module = name.split("/__call__")[0].rpartition("/")[2]
        if module not in parts:
            continue
        heads = module == "value"
        flat = y.reshape(*y.shape[:-2], -1) if heads else y
        again = model.quantise(flat, how.values)
        np.testing.assert_array_equal(again, flat, err_msg=name)
        looked += 1
    assert looked >= 15


def test_padding_enters_no_block_that_is_read():
    plain, params, tokens, valid = encoder()
    how = scheme("int8", value_block=8)
    params = compress_parameters(params, how)
    one = compressed(plain, Simulated(how))
    other = jnp.where(valid, tokens, (tokens + 7) % 20)
    np.testing.assert_array_equal(
        logits(one, params, tokens, valid), logits(one, params, other, valid)
    )


def test_blocks_keep_what_a_shift_per_tensor_loses():
    """A single channel of outliers, in a model that computes the same."""
    config = load_config("bct:tiny")
    plain, params, tokens, valid = encoder()
    params = injection(config)(params)
    exact = logits(plain, params, tokens, valid)
    errors = {}
    for granularity in ("block", "row", "tensor"):
        how = scheme("int8", granularity, **SMALL)
        found = compressed(plain, Simulated(how))
        y = logits(found, compress_parameters(params, how), tokens, valid)
        errors[granularity] = float(jnp.linalg.norm(y - exact))
    assert errors["block"] < errors["row"] < errors["tensor"]


def test_the_other_configurations_run():
    plain, params, tokens, valid = encoder()
    exact = logits(plain, params, tokens, valid)
    for how in (scheme("fp8", **SMALL), scheme("int8", probs_unsigned=True, **SMALL)):
        y = logits(
            compressed(plain, Simulated(how)), compress_parameters(params, how), tokens, valid
        )
        assert 0 < float(jnp.abs(y - exact).max()) < 0.3 * float(jnp.abs(exact).max())


# --------------------------------------------------------------------------------- static shifts

HOW = scheme("int8", **SMALL)


class Watched(Static):
    """Counts codes that would have been beyond the largest one."""

    def rounded(self, module, place, x, spec, heads=None):
        seen = module.get_variable(RANGES, place)
        scale = 2.0 ** blocks.shift_of(seen, spec.largest)
        parts = [x] if heads is None else list(jnp.moveaxis(x, heads, 0))
        for part, row in zip(parts, jnp.atleast_2d(scale), strict=True):
            codes = jnp.round(blocks._tile(part, spec) * row[None, None, :, None])
            module.sow("intermediates", place, (jnp.abs(codes) > spec.largest).sum())
        return super().rounded(module, place, x, spec, heads)


def clipped(variables, tokens, valid):
    """How many codes clip, place by place."""
    watched = compressed(encoder()[0], Watched(HOW))

    @jax.jit
    def run(variables):
        return watched.apply(variables, tokens, valid_BxL=valid, mutable=["intermediates"])[1]

    return jax.tree.leaves(run(variables)["intermediates"])


@functools.cache
def calibrated(**fields):
    """The static model, and its variables after one batch."""
    plain, params, tokens, valid = encoder(**fields)
    static = compressed(plain, Static(HOW))
    made = jax.jit(static.init)(KEY, tokens, valid_BxL=valid)
    variables = {"params": compress_parameters(params, HOW), RANGES: made[RANGES]}
    return static, look(static, variables, tokens, valid)


def look(static, variables, tokens, valid):
    @jax.jit
    def run(variables):
        return static.apply(variables, tokens, valid_BxL=valid, mutable=[RANGES])[1]

    return {**variables, **run(variables)}


def test_no_code_clips_on_the_batch_that_was_looked_at():
    static, variables = calibrated()
    _, _, tokens, valid = encoder()
    counts = clipped(variables, tokens, valid)
    assert len(counts) > 60 and sum(counts) == 0
    again = look(static, variables, tokens, valid)
    jax.tree.map(np.testing.assert_array_equal, again[RANGES], variables[RANGES])
    params = jax.tree.map(lambda x: x * 1.5, variables["params"])
    assert sum(clipped({**variables, "params": params}, tokens, valid)) > 0


def test_static_shifts_are_dynamic_ones_where_all_tokens_are_alike():
    plain, params, tokens, _ = encoder()
    params = compress_parameters(params, HOW)
    position = params["encoder"]["position"]
    params = {**params, "encoder": {**params["encoder"], "position": tree_zeros(position)}}
    tokens, valid = jnp.full_like(tokens, 7), jnp.ones(tokens.shape, bool)
    static, made = calibrated()
    variables = {"params": params, RANGES: tree_zeros(made[RANGES])}
    variables = look(static, variables, tokens, valid)
    dynamic = logits(compressed(plain, Simulated(HOW)), params, tokens, valid)
    run = jax.jit(lambda v, t: static.apply(v, t, valid_BxL=valid))
    np.testing.assert_array_equal(run(variables, tokens), dynamic)
    # Other tokens have other largest values, and are then rounded otherwise.
    others = encoder()[2]
    dynamic = logits(compressed(plain, Simulated(HOW)), params, others, valid)
    assert (run(variables, others) != dynamic).any()


def tree_zeros(tree):
    return jax.tree.map(jnp.zeros_like, tree)


def test_shifts_are_found_by_a_phase_of_calibration(tmp_path, one_device):
    recipe = jaxformer.load(
        "bct:tiny",
        steps=2,
        model__depth=1,
        evaluate__batches=1,
        compress__static=True,
        compress__calibration=3,
    )
    assert [(p.name, p.steps) for p in recipe.phases][1:] == [("compress", 0), ("calibrate", 3)]
    options = FitOptions(progress=False, log_every=1)
    state = fit(recipe, workdir=tmp_path, mesh=one_device, options=options)
    ranges = jax.tree.leaves(state.extra[RANGES])
    assert len(ranges) > 25 and all((x > 0).all() for x in ranges)
    rows = read_jsonl(tmp_path / "metrics.jsonl")
    seen = [row["largest"] for row in rows if "largest" in row]
    assert len(seen) == 3 and seen == sorted(seen)
    assert any("compressed/accuracy" in row for row in rows)


def uncalibrated():
    static, variables = calibrated()
    _, _, tokens, valid = encoder()
    return static.apply({"params": variables["params"]}, tokens, valid_BxL=valid)


# ------------------------------------------------------------------------------------ parameters


@pytest.mark.parametrize("scan", [False, True])
def test_matrices_have_outputs_as_rows(scan):
    params = encoder(scan=scan)[1]
    for name, x in paths.leaves(params).items():
        matrix = as_matrix(name, x)
        np.testing.assert_array_equal(from_matrix(name, matrix, x.shape), x)
    name = "encoder/stack/" + ("blocks" if scan else "block_0") + "/mixer/query/kernel"
    shape = as_matrix(name, paths.leaves(params)[name]).shape
    assert shape == ((2, 32, 32) if scan else (32, 32))


def test_stacked_layers_are_compressed_alike():
    params, how = encoder()[1], scheme("int4/8", weight_block=(24, 24), value_block=16)
    one = stack_layers(compress_parameters(params, how))
    other = compress_parameters(stack_layers(params), how)
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.parametrize("bits", ["int8", "int4/8"])
def test_the_saved_bytes_are_the_model(bits):
    params, how = encoder()[1], scheme(bits, shift_bits=6, **SMALL)
    saved = model.packed(params, how)
    expected = compress_parameters(params, how)
    total = 0
    for name, x in paths.leaves(params).items():
        spec, shape = model.spec_of(name, x, how), as_matrix(name, x).shape
        parts = {part: saved[f"{name}:{part}"] for part in ("codes", "shifts")}
        back = from_matrix(name, decompress(unpack(parts, shape, spec), spec), x.shape)
        np.testing.assert_array_equal(back, paths.leaves(expected)[name])
        total += packed_bytes(shape, spec)
    assert total == sum(x.nbytes for x in saved.values())


def test_compression_is_a_phase_that_trains_nothing():
    recipe = jaxformer.load("bct:tiny")
    assert [(phase.name, phase.steps) for phase in recipe.phases] == [
        ("train", 60),
        ("compress", 0),
    ]
    assert recipe.phases[1].update is None and recipe.phases[1].data is None
    paper = jaxformer.load("bct:paper")
    how = paper.task.model.interceptors[0].scheme
    assert (how.weights.rows, how.weights.columns, how.weights.shift_bits) == (32, 32, 6)


@pytest.mark.parametrize(
    ("task", "score"), [("sts-b", "pearson"), ("cola", "matthews"), ("squad", "exact")]
)
def test_files_of_tasks_are_trained_on_and_compressed(tmp_path, one_device, task, score):
    fields = {"batch_size": 8, "outliers__at": "none", "compress__bits": "int8"}
    if task == "squad":
        fields |= text_files.squad(tmp_path)
    else:
        fields |= text_files.glue(tmp_path, task)
    recipe = jaxformer.load("bct:tiny", steps=60, **fields)
    options = FitOptions(progress=False, log_every=60)
    fit(recipe, workdir=tmp_path / "run", mesh=one_device, options=options)
    rows = [row for row in read_jsonl(tmp_path / "run/metrics.jsonl") if f"float/{score}" in row]
    assert rows[0]["phase"] == "train" and rows[0][f"float/{score}"] > 0.95
    compressed = rows[-1][f"compressed/{score}"]
    assert compressed > 0.9 and rows[-1]["compressed/loss"] != rows[0]["float/loss"]


# -------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("act", "said"),
    [
        (lambda: scheme("int6"), r"compress\.bits='int6': must be one of float, int8"),
        (lambda: scheme("int8", "layer"), r"compress\.granularity='layer'"),
        (lambda: scheme("int8", weight_block=(0, 64)), r"BlockSpec\.rows=0"),
        (lambda: Integer(scheme("fp8")), r"integer arithmetic has integers of 4 and 8 bits"),
        (lambda: Integer(scheme("float")), r"BlockSpec\.bits=32.* integers of 4 and 8 bits"),
        (lambda: jaxformer.load("bct:tiny", model__order="post"), r"outliers\.at='norms'"),
        (uncalibrated, r"encoder/embed/output: is not calibrated; run the calibration phase"),
        (
            lambda: jaxformer.load("bct:tiny", compress__static=True, compress__integer=True),
            r"compress\.static=True: is simulated; give compress\.integer=False",
        ),
        (
            lambda: jaxformer.load("bct:tiny", compress__static=True, model__scan=True),
            r"compress\.static=True: every layer has its own; give model\.scan=False",
        ),
        (
            lambda: jaxformer.load("bct:tiny", compress__static=True, compress__calibration=0),
            r"compress\.calibration=0: give at least 1 batch",
        ),
        (lambda: jaxformer.load("bct:tiny", outliers__at="here"), r"outliers\.at='here'"),
        (lambda: jaxformer.load("bct:tiny", init_from="runs/x"), r"config\.steps=60: .* give 0"),
        (lambda: jaxformer.load("bct:tiny", data__task="stsb"), r"data\.task='stsb': must be one"),
    ],
)
def test_mistakes_are_named(act, said):
    with pytest.raises(ConfigError, match=said):
        act()


def test_parameters_that_are_not_finite_are_refused():
    params = dict(encoder()[1])
    params["head"] = jax.tree.map(lambda x: x * jnp.nan, params["head"])
    with pytest.raises(ConfigError, match="not finite"):
        model.packed(params, scheme("int8"))
