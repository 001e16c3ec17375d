"""`jaxformer bench h200`: every stage runs in miniature, and its results say what they are."""

import json
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import pytest

from jaxformer.bench import regressions
from jaxformer.bench.attention import bench_attention
from jaxformer.bench.clock import Deadline, Run, Timing, program, race
from jaxformer.bench.decode import bench_decode
from jaxformer.bench.h200 import report, run
from jaxformer.bench.stage import Stage
from jaxformer.bench.targets import TARGETS, judge
from jaxformer.bench.training import TRAININGS
from jaxformer.cli import main
from jaxformer.errors import ConfigError
from jaxformer.kernels import tuned

STAGES = ("numerics", "peak", "forward", "backward", "mods", "linear", "train", "tune")


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_runs_in_miniature(stage, tmp_path):
    text = run(tmp_path, stage, tiny=True)
    found = json.loads((tmp_path / f"{stage}.json").read_text())
    assert found["rows"] and not found["left_out"]
    assert {"date", "device", "versions", "tiny"} <= found.keys()
    ours = [row for row in found["rows"] if not str(row.get("who")).startswith("cudnn")]
    assert not [row for row in ours if "error" in row]
    assert all(row["right"] for row in ours if stage == "numerics")
    assert all(row["ms"] > 0 for row in ours if stage != "numerics")
    if stage == "train":
        assert [row["model"] for row in ours] == ["tiny GPT", "tiny ViT", "tiny DiT"]
    assert "figures mean nothing" in text and text == (tmp_path / "report.md").read_text()
    # There is no cuDNN here: its rows say so, and its absence stopped nothing.
    cudnn = [row for row in found["rows"] if row not in ours]
    assert bool(cudnn) == (stage in ("forward", "backward", "linear"))
    assert all("cuDNN" in row["error"] for row in cudnn)
    if stage == "tune":
        entries = json.loads((tmp_path / "tiles.json").read_text())["entries"]
        assert {entry["op"] for entry in entries} == {"attention", "linear_attention"}


def test_flops_of_a_dit_are_the_published_ones():
    """118.6 G multiply-adds for an image of DiT-XL/2 (arXiv 2212.09748, table 4), times 6."""
    training = next(x for x in TRAININGS if x.name == "DiT-XL/2")
    latent = jax.ShapeDtypeStruct((1, training.side, training.side, 4), jnp.float32)
    params = jax.eval_shape(training.init, jax.random.key(0), latent)
    assert training.flops(params) / training.batch / 6e9 == pytest.approx(118.6, abs=0.05)
    assert sum(x.size for x in jax.tree.leaves(params)) == pytest.approx(675e6, rel=1e-3)


def test_nothing_measured_is_called_not_measured(tmp_path):
    text = report(tmp_path)
    assert text.count("Not measured.") == len(STAGES)
    assert {row["verdict"] for row in judge({})} == {"not measured"}


def test_targets_compare_rows_of_one_run():
    def plain(who, ms, size=64, causal=True, length=4096):
        return {"who": who, "ms": ms, "head_size": size, "causal": causal, "L": length}

    forward = [
        plain("cudnn", 1.0),
        plain("ours triton", 4.0),
        plain("ours mosaic_gpu", 0.9),
        plain("cudnn", 1.0, causal=False),
        plain("ours mosaic_gpu", 1.25, causal=False),
        plain("ours mosaic_gpu", 1.0, size=128),  # without cuDNN's row there is no ratio
    ]
    window = {"mod": "window 1k", "L": 16384, "head_size": 128, "pass": "forward"}
    mods = [
        window | {"who": "ours mosaic_gpu", "ms": 1.0, "TFLOP/s": 80.0},
        window | {"who": "plain mosaic_gpu", "ms": 8.0, "TFLOP/s": 100.0},
    ]
    train = [{"model": "GPT-2 124M", "MFU": 0.3}]
    table = judge({"forward": forward, "mods": mods, "train": train})
    found = {row["target"]: (row["measured"], row["verdict"]) for row in table}
    assert len(found) == len(TARGETS)
    assert found["forward / cuDNN, hd64"] == (0.8, "missed")  # the worse of causal and full
    assert found["forward / cuDNN, hd128 full"] == ("not measured", "not measured")
    assert found["window 1k / full causal, L = 16k"] == (8.0, "stretch")
    assert found["mods / own plain, forward"] == (0.8, "missed")
    assert found["MFU GPT-2 124M"] == (0.3, "missed")
    assert found["MFU GPT 1.3B"] == ("not measured", "not measured")


def test_figures_of_a_miniature_reach_no_target(tmp_path):
    row = {"model": "GPT-2 124M", "MFU": 0.9}
    stage = {"date": "", "devices": 1, "device": "", "versions": {}, "rows": [row], "left_out": []}
    for tiny, verdict in ((True, "not measured"), (False, "stretch")):
        (tmp_path / "train.json").write_text(json.dumps({"tiny": tiny, **stage}))
        (line,) = [x for x in report(tmp_path).splitlines() if x.startswith("| MFU GPT-2")]
        assert line.endswith(f"| {verdict} |")


def test_wrong_numerics_are_named_first(tmp_path):
    row = {"case": "causal 64", "who": "ours triton", "right": False}
    stage = {"date": "", "devices": 1, "device": "", "versions": {}, "left_out": [], "tiny": False}
    rows = [row, row | {"who": "ours mosaic_gpu", "right": True}, {"case": "sink", "error": "no"}]
    (tmp_path / "numerics.json").write_text(json.dumps(stage | {"rows": rows}))
    text = report(tmp_path)
    assert "Right: 1 of 2 cases." in text and "Wrong: causal 64 by ours triton." in text


def test_rows_have_their_speed_over_another(tmp_path):
    stage = Stage("mods", tmp_path, Deadline.after(1))
    timings = {
        "ours triton": Timing(2.0, 1),
        "plain triton": Timing(1.0, 1),
        "ours mosaic_gpu": Timing(None, 0, "no"),
        "torch flex": Timing(4.0, 1),
    }
    work = {"ours triton": 1.0, "plain triton": 1.0, "torch flex": 1.0, "ours mosaic_gpu": 1.0}
    stage.add_race({"mod": "x"}, timings, against="plain", work=work.__getitem__)
    assert [row.get("speed / plain") for row in stage.rows] == [0.5, None, None, None]
    stage.add_race({"mod": "x"}, timings, against="torch flex", work=work.__getitem__)
    assert [row.get("speed / torch flex") for row in stage.rows[4:]] == [2.0, 4.0, None, None]


def test_a_race_survives_failures_and_stops_in_time():
    def fails():
        raise RuntimeError("no memory\nand a long story")

    def later():
        if len(calls) > 2:
            fails()
        calls.append(0)

    calls: list[int] = []
    timings = race(
        {
            "good": lambda: program(jnp.sin, jnp.ones(3)),
            "fails": fails,
            "fails later": lambda: Run(later, lambda result: None),
        },
        Deadline(time.monotonic() - 1, repeats=20),
    )
    assert timings["good"].seconds > 0
    assert timings["good"].samples == 1  # one round even when there is no time left
    assert timings["fails"].error == timings["fails later"].error == "RuntimeError: no memory"


def test_what_there_is_no_time_for_is_said(tmp_path):
    text = run(tmp_path, "peak", tiny=True, minutes=-1.0)
    assert json.loads((tmp_path / "peak.json").read_text())["rows"]
    text = run(tmp_path, "linear", tiny=True, minutes=-1.0)
    assert not json.loads((tmp_path / "linear.json").read_text())["rows"]
    assert "Left out for want of time: 1 cases." in text


def test_tuned_tiles_are_read_by_device(tmp_path, monkeypatch):
    entry = {"op": "attention", "impl": "triton", "head_size": 64}
    entries = [entry | {"L": 1024, "tiles": [64, 64]}, entry | {"L": 4096, "tiles": [128, 64]}]
    (tmp_path / "cpu.json").write_text(json.dumps({"entries": entries}))
    monkeypatch.setattr(tuned, "FOLDER", tmp_path)
    tuned._entries.cache_clear()
    assert tuned.tuned("attention", "triton", 3000, head_size=64) == [128, 64]
    assert tuned.tuned("attention", "triton", 3000, head_size=128) is None
    tuned._entries.cache_clear()


@pytest.mark.slow  # PyTorch compiles for half a minute
def test_decode_bench_compares_the_same_tokens():
    pytest.importorskip("transformers")
    sizes = {"n_layer": 1, "n_embd": 32, "n_head": 2, "vocab_size": 99, "bos_token_id": 0}
    options = {"prompt": 12, "length": 6, "rounds": 1, "trial": 2}
    rows = bench_decode((1, 3), types=("float32",), **options, **sizes, eos_token_id=0)
    assert [row["batch"] for row in rows] == [1, 3]
    for row in rows:
        assert row["same tokens"] == "100.0%"
        assert row["ratio"] == pytest.approx(row["tokens/s"] / row["theirs tokens/s"])
        assert row["prefill s"] > 0


def test_decode_bench_says_what_it_needs(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert main(["bench", "decode"]) == 2
    assert "needs transformers; install the test extra" in capsys.readouterr().err


def test_attention_bench_prints_the_plan():
    rows = bench_attention((64,), heads=1, head_size=8, runs=1)
    assert [row["pass"] for row in rows] == ["forward", "forward + backward"]
    assert all(
        {"implementation", "tiles", "GFLOP", "moved MiB", "why"} <= row.keys() for row in rows
    )


def test_mistakes_are_named(tmp_path, capsys):
    with pytest.raises(ConfigError, match="--stage speed: allowed are numerics, peak"):
        run(tmp_path, "speed")
    assert main(["bench", "attention", "--tiny"]) == 2
    assert "--tiny is for bench h200" in capsys.readouterr().err


@pytest.mark.slow
def test_a_bare_checkout_is_enough(tmp_path):
    """Without the packages that only other verbs need."""
    absent = ("ml_collections", "grain", "sklearn", "diffrax", "matplotlib", "chex", "torch")
    program = (
        f"import sys; sys.modules.update(dict.fromkeys({absent!r}))\n"
        "from jaxformer.cli import main\n"
        f"arguments = ['bench', 'h200', '--tiny', '--out', {str(tmp_path)!r}]\n"
        "assert main([*arguments, '--stage', 'peak']) == 0\n"
        "import jaxformer.bench.training, jaxformer.bench.tune\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "| target | measured |" in done.stdout


def test_regressions_by_sweeps_find_the_rate_that_comes_nearest(monkeypatch):
    for name, value in {"LENGTHS": (3,), "RATES": (1e-4, 1e-1), "SEEDS": 2}.items():
        monkeypatch.setattr(regressions, name, value)
    one, total = regressions.bench_regressions(steps=40, prompts=64)
    assert one["best rate"] == 1e-1
    assert 0 < one["excess"] < 0.2
    assert total["members"] == one["members"] == 4
