"""`jaxformer compress`: chains of papers' methods, what they leave, and what is said of them."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxformer
from jaxformer import paths
from jaxformer.bench.compress import Sizes, bench_compress
from jaxformer.catalogue import build, compressor_of, compressors
from jaxformer.cli import main
from jaxformer.compress.compressor import check_fits, ready
from jaxformer.compress.packed import Packed, is_packed, nbytes
from jaxformer.errors import ConfigError
from jaxformer.evaluation.exams import ImageAccuracy
from jaxformer.tools.compress import Plan, compress
from jaxformer.tools.convert import export, import_folder
from jaxformer.tools.evaluate import evaluate
from jaxformer.tools.subject import open_subject, run_config
from jaxformer.tools.tradeoffs import Model, frontier
from jaxformer.train.fit import FitOptions, fit

QUICK = {"examples": 8, "seconds": 0.5}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A ViT of digits in 16 patches, hardly trained."""
    workdir = tmp_path_factory.mktemp("runs") / "vit"
    recipe = jaxformer.load("vit:tiny", steps=30, evaluate__batches=2)
    fit(recipe, workdir=workdir, options=FitOptions(progress=False))
    return workdir


@pytest.fixture(scope="module")
def chain(run, tmp_path_factory):
    """Narrower, then with few bits: (the folder, rows of its table)."""
    out = tmp_path_factory.mktemp("chain") / "out"
    methods = ("nvit:0.8", "dopq_vit:w4a4")
    page = compress(run, Plan(methods, outliers=2, **QUICK), out)
    assert page == out / "report.md"
    return out, json.loads((out / "result.json").read_text())["models"]


def test_a_chain_is_measured_link_by_link(chain):
    out, rows = chain
    whole, narrow, packed = rows
    assert whole["agreement"] == 1 and whole["speed"] == 1
    assert narrow["bytes"] < whole["bytes"] and narrow["MFLOP"] < 0.9 * whole["MFLOP"]
    assert packed["bytes"] < 0.4 * narrow["bytes"] and packed["MFLOP"] == narrow["MFLOP"]
    assert all(row["ms"] > 0 and 0 <= row["accuracy"] <= 1 for row in rows)
    text = (out / "report.md").read_text()
    assert "fake quantisation" in text and "pareto.png" in text
    assert text.count("\n| nvit:0.8") == 2 and (out / "pareto.png").stat().st_size > 1000


def test_what_a_chain_leaves_is_a_run(chain, tmp_path):
    """It gives what was measured before it was saved, and again after export and import."""
    out, rows = chain
    (found,) = evaluate(out)
    assert found["test/accuracy"] == rows[-1]["accuracy"]
    assert found["test/loss"] == pytest.approx(rows[-1]["loss"], rel=1e-6)
    import_folder(export(out, tmp_path / "released"), tmp_path / "again")
    (again,) = evaluate(tmp_path / "again")
    assert again["test/loss"] == found["test/loss"]


def test_the_size_on_disk_is_the_claimed_one(chain, tmp_path):
    """The exported file holds the packed arrays; its header of names is what is left."""
    out, rows = chain
    file = export(out, tmp_path / "released") / "model.safetensors"
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    assert file.stat().st_size - header == rows[-1]["bytes"]
    subject = open_subject(out)
    assert nbytes((subject.state.params, subject.state.extra)) == rows[-1]["bytes"]
    kernel = subject.state.params["encoder"]["stack"]["block_0"]["mlp"]["up"]["kernel"]
    assert isinstance(kernel, Packed) and kernel.codes.bits == 4
    assert 2 * kernel.codes.data.size == np.prod(kernel.codes.shape)


def test_a_compressed_run_is_compressed_further(chain, tmp_path):
    out, rows = chain
    compress(out, Plan(("zero_tprune:0.9",), **QUICK), tmp_path / "b")
    links = run_config(tmp_path / "b").compressed.links
    methods = ["nvit:0.8", "dopq_vit:w4a4", "zero_tprune:0.9"]
    assert [link["method"] for link in links] == methods
    before, after = json.loads((tmp_path / "b" / "result.json").read_text())["models"]
    assert before["loss"] == pytest.approx(rows[-1]["loss"], rel=1e-6)
    assert after["MFLOP"] <= 0.9 * before["MFLOP"] and after["bytes"] == before["bytes"]
    for again, message in (("nvit:0.5", "packed by a method before"), ("zero_tprune:0.8", "once")):
        with pytest.raises(ConfigError, match=message):
            compress(tmp_path / "b", Plan((again,), **QUICK), tmp_path / "c")


@pytest.mark.slow
def test_a_hugging_face_folder_is_compressed(tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    images = {"image_size": 16, "patch_size": 4, "num_channels": 1, "num_labels": 10}
    config = transformers.ViTConfig(**sizes, **images, intermediate_size=32)
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "folder")
    where = ["--checkpoint", str(tmp_path / "folder"), "--out", str(tmp_path / "out")]
    given = [
        "--method",
        "zero_tprune:0.9",
        "--method",
        "noisyquant:w8a8",
        "--examples",
        "8",
        "--seconds",
        "0.5",
    ]
    assert main(["compress", *where, *given]) == 2
    assert "name images by --calibration" in capsys.readouterr().err
    assert main(["compress", *where, *given, "--calibration", "digits"]) == 2
    assert "name images by --images" in capsys.readouterr().err
    data = ["--calibration", "digits", "--images", "digits"]
    assert main(["compress", *where, *given, *data]) == 0
    assert "| zero_tprune:0.9 + noisyquant:w8a8 |" in capsys.readouterr().out
    row = json.loads((tmp_path / "out" / "result.json").read_text())["models"][-1]
    (found,) = evaluate(tmp_path / "out", exams=[ImageAccuracy("digits")])
    assert found["images/accuracy"] == row["accuracy"]


@pytest.mark.slow
def test_a_language_model_is_factorised_and_sampled(tmp_path, capsys):
    sizes = {"model__hidden": 32, "model__kv_heads": 2}  # one shape, to be compiled once
    recipe = jaxformer.load("decoder:tiny", steps=4, evaluate__batches=1, **sizes)
    fit(recipe, workdir=tmp_path / "run", options=FitOptions(progress=False))
    compress(tmp_path / "run", Plan(("dsformer:1.5",), **QUICK), tmp_path / "out")
    before, after = json.loads((tmp_path / "out" / "result.json").read_text())["models"]
    assert after["bytes"] < before["bytes"] and 0 < after["agreement"] < 1
    (found,) = evaluate(tmp_path / "out")
    assert found["validation/loss"] == pytest.approx(after["loss"], rel=1e-5)
    arguments = ["--prompt", "def ", "--length", "8", "--temperature", "0"]
    assert main(["sample", "--workdir", str(tmp_path / "out"), *arguments]) == 0
    assert capsys.readouterr().out.startswith("def ")


def test_settings_are_compared(run, tmp_path):
    chains = ["zero_tprune:0.9", "zero_tprune:0.8", "nvit:0.8+zero_tprune:0.8"]
    given = ["--sweep", ",".join(chains), "--examples", "8", "--seconds", "0.5"]
    out = tmp_path / "out"
    assert main(["compress", "--checkpoint", str(run), *given, "--out", str(out)]) == 0
    rows = json.loads((out / "result.json").read_text())["models"]
    assert [row["model"] for row in rows[1:]] == [c.replace("+", " + ") for c in chains]
    assert rows[3]["MFLOP"] < rows[2]["MFLOP"] < rows[1]["MFLOP"] < rows[0]["MFLOP"]
    assert (out / "pareto.png").exists() and not (out / "checkpoints").exists()


def test_the_frontier_is_what_nothing_beats():
    points = [(1.0, 0.5), (2.0, 0.4), (2.0, 0.9), (3.0, 0.9), (0.5, 0.1)]
    assert frontier(points) == [(0.5, 0.1), (1.0, 0.5), (2.0, 0.9)]


def test_the_papers_that_offer_a_method():
    assert {"adalog", "dopq_vit", "dsformer", "noisyquant", "nvit", "zero_tprune"} <= set(
        compressors()
    )


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("adalgo:w4a4", "method: 'adalgo:w4a4' is not one of adalog"),
        ("pfn:0.5", "method: 'pfn:0.5' is not one of"),
        ("adalog:4", "'4' must read like w4a4"),
        ("adalog:w1a4", "both from 2 to 8"),
        ("zero_tprune:1.5", "share of FLOPs that is left, such as 0.65, a number between 0 and 1"),
        ("nvit", "share of FLOPs that is left"),
        ("dsformer:0.5", "how many times smaller"),
        ("dsformer:4:4", "'4:4' must be of 1 to 3 values in 4"),
    ],
)
def test_an_unknown_method_is_named(method, message):
    with pytest.raises(ConfigError, match=message):
        compressor_of(method)


def test_bad_input_is_named(run, chain, tmp_path, capsys):
    arguments = ["compress", "--checkpoint", str(run), "--out", str(tmp_path / "x")]
    assert main(arguments) == 2
    assert "give at least one --method, or a --sweep" in capsys.readouterr().err
    assert main([*arguments, "--method", "zero_tprune:0.1"]) == 2
    assert "zero_tprune:0.1 is out of reach with 2 blocks and 16 tokens" in capsys.readouterr().err
    assert main([*arguments[:-1], str(chain[0]), "--method", "nvit:0.5"]) == 2
    assert "holds a run already" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_variables_of_another_model_are_refused(run):
    task = build(run_config(run)).task
    subject = open_subject(run)
    params = {**subject.state.params, "more": jnp.ones(3)}
    with pytest.raises(ConfigError, match=r"'more' became \(3,\), the model has nothing"):
        check_fits(task, params, {}, {"image": jnp.ones((1, 16, 16, 1))})
    check_fits(task, subject.state.params, {}, {"image": jax.ShapeDtypeStruct((1, 16, 16, 1), "f")})


def test_what_is_unpacked_beforehand_answers_alike(run):
    """Sparse factors in both forms that they are applied in, then codes of 4 bits."""
    params = open_subject(run).state.params
    first = Model("run", build(run_config(run)).task, params, {})
    image = np.random.default_rng(0).random((2, 16, 16, 1), np.float32)
    batch = {"image": jnp.asarray(image), "label": jnp.zeros(2, jnp.int32)}
    for methods in (["dsformer:2.8", "dopq_vit:w4a4"], ["dsformer:2:4"], ["adalog:w4a4"]):
        model = first.chain(methods, batch)[-1]
        params, extra = ready(model.task, model.params, model.extra)
        assert nbytes((params, extra)) > nbytes((model.params, model.extra))
        wanted = model.predict(model.params, model.extra, batch)
        np.testing.assert_allclose(model.predict(params, extra, batch), wanted, atol=1e-5)


def test_places_in_groups_of_four_are_stored_in_two_bits(run):
    params = open_subject(run).state.params
    task, batch = build(run_config(run)).task, {"image": jnp.zeros((1, 16, 16, 1))}
    found = Model("run", task, params, {}).then("dsformer:2:4", batch)
    codes = jax.tree.leaves(found.extra["factors"], is_leaf=is_packed)
    assert codes and all(each.bits == 2 for each in codes)
    up = paths.leaves(found.params)["encoder/stack/block_0/mlp/up/values"]
    places = found.extra["factors"]["encoder"]["stack"]["block_0"]["mlp"]["up"]["indices"].unpack()
    assert places.shape == up.shape
    pairs = np.asarray(places).reshape(-1, 2)
    assert (pairs[:, 0] < pairs[:, 1]).all() and places.max() == 3


@pytest.mark.slow
def test_the_bench_measures_every_kind_of_saving():
    """In miniature; what it says of targets means nothing at this size."""
    sizes = Sizes(32, 4, 2, 64, image=32, patch=8, classes=10, columns=16, seconds=1.0)
    rows = {row["model"]: row for row in bench_compress(sizes, calibrate=False)}
    assert list(rows) == ["dense", "zero_tprune:0.65", "nvit:0.5", "dsformer:2.8"]
    assert rows["dense"]["speed"] == 1 and rows["dense"]["FLOPs"] == 1
    assert rows["zero_tprune:0.65"]["FLOPs"] <= 0.65 and rows["nvit:0.5"]["FLOPs"] < 0.6
    assert all(row["images/s"] > 0 for row in rows.values())
    assert {row["met"] for row in list(rows.values())[1:]} <= {True, False}
