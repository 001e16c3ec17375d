"""Every attention in one model: the page, the refusals, and that all offered ones run."""

import json

import pytest

from jaxformer.cli import main
from jaxformer.errors import ConfigError
from jaxformer.tools.compare import Comparison, compare, offered
from jaxformer.tools.testbeds import TESTBEDS

SIZES = {"steps": 2, "batch": 8, "width": 16, "depth": 1, "heads": 2, "turns": 1}


@pytest.mark.slow
@pytest.mark.parametrize("task, lengths", [("recall", (64, 96)), ("digits", (64,))])
def test_a_page_has_every_mixer_at_every_length(task, lengths, tmp_path):
    mixers = ("softmax", "urpe", "flowformer")
    page = compare(Comparison(mixers, task, lengths, **SIZES), tmp_path)
    found = json.loads((tmp_path / f"{task}.json").read_text())
    pairs = {(mixer, length) for mixer in mixers for length in lengths}
    for part in ("quality", "cost"):
        assert {(row["mixer"], row["L"]) for row in found[part]} == pairs
    assert all(0 <= row[TESTBEDS[task].score] <= 1 for row in found["quality"])
    assert all(row["ms"] > 0 and row["temporary MiB"] > 0 for row in found["cost"])
    text = page.read_text()
    assert all(text.count(f"\n| {mixer} |") == 4 for mixer in mixers)
    for name in ("quality", "cost"):
        assert f"]({task}-{name}.png)" in text and (tmp_path / f"{task}-{name}.png").exists()


@pytest.mark.slow
@pytest.mark.parametrize("mixer", offered())
def test_every_mixer_that_is_offered_runs_beyond_its_length(mixer, tmp_path):
    what = Comparison((mixer,), "recall", (64, 100), **SIZES)
    compare(what, tmp_path)
    rows = json.loads((tmp_path / "recall.json").read_text())["quality"]
    assert [row["L"] for row in rows] == [64, 100]


def test_more_length_is_more_work(tmp_path):
    what = Comparison(("linear",), "recall", (256, 512), **{**SIZES, "steps": 0})
    compare(what, tmp_path)
    found = json.loads((tmp_path / "recall.json").read_text())
    assert not found["quality"]
    short, long = (row["GFLOP"] for row in found["cost"])
    assert long == pytest.approx(2 * short, rel=0.01)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"mixers": ("pfn",)}, "mixers: 'pfn' is not one of softmax, linear"),
        ({"mixers": ()}, "give at least one"),
        ({"task": "chess"}, "task: 'chess'; allowed: lm, recall, listops, digits"),
    ],
)
def test_bad_input_is_named(arguments, message):
    with pytest.raises(ConfigError, match=message):
        Comparison(**{"mixers": ("softmax",), "task": "lm", "lengths": (64,), **arguments})


def test_lengths_that_are_no_numbers_are_named(capsys):
    assert main(["compare", "--lengths", "512,many"]) == 2
    assert "lengths: '512,many' is no list of numbers" in capsys.readouterr().err
    assert main(["compare", "--task", "digits", "--lengths", "100", "--steps", "0"]) == 2
    assert "100 pixels are no square" in capsys.readouterr().err
