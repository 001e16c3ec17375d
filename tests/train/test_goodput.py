"""The account of a run's time, over kills and restarts, and traces of chosen steps."""

import json

import jax
import pytest

from jaxformer.errors import ConfigError
from jaxformer.evaluation.goodput import goodput
from jaxformer.observe.goodput import FILE, Goodput
from jaxformer.observe.trace import traced_steps
from jaxformer.train.fit import FitOptions, Interrupted, fit
from tests.train.problem import phase, recipe


def written(workdir, *rows):
    """A file of rows (start, time, step, seconds by reason)."""
    names = ("start", "time", "step", "seconds")
    lines = [json.dumps(dict(zip(names, row, strict=True))) for row in rows]
    (workdir / FILE).write_text("\n".join(lines) + "\n")


def test_repeated_steps_and_restarts_are_not_productive(tmp_path):
    written(
        tmp_path,
        (100, 102, 0, {"start": 2}),
        (100, 112, 10, {"start": 2, "steps": 10}),
        (100, 132, 30, {"start": 2, "steps": 30}),  # killed after this; the last save was at 15
        (140, 143, 15, {"start": 1, "restore": 2}),
        (140, 158, 30, {"start": 1, "restore": 2, "steps": 15}),
    )
    found = goodput(tmp_path)
    assert found.productive == 15 + 15
    assert found.lost == {"repeated steps": 15, "restarts": 8, "start": 3, "restore": 2}
    assert found.wall == 158 - 100 and found.starts == 2
    assert str(found).startswith("51.7 % of 58.0 s in 2 starts; the rest: repeated steps 25.9 %")


def test_a_start_from_an_older_checkpoint_repeats_the_work_of_all_before(tmp_path):
    written(
        tmp_path,
        (0, 0, 0, {}),
        (0, 20, 20, {"steps": 20}),
        (20, 20, 20, {}),
        (20, 30, 30, {"steps": 10}),
        (30, 30, 5, {}),  # the newer checkpoints were damaged
        (30, 55, 30, {"steps": 25}),
    )
    found = goodput(tmp_path)
    assert found.productive == 5 + 0 + 25
    assert found.lost == {"repeated steps": 15 + 10}


def test_every_second_has_one_reason(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("jaxformer.observe.goodput.time.monotonic", lambda: clock[0])
    account = Goodput(None)
    clock[0] = 1.0
    with account.spent("steps"):
        account.finished(dispatched=0.5)  # a step takes half a second
        with account.waiting_for_data(dispatched=0.8):
            clock[0] = 2.0  # until 1.3 the step still ran
        with account.spent("save"):
            clock[0] = 2.2
        clock[0] = 3.0
    account.book("done")
    assert account.seconds == pytest.approx({"start": 1, "data": 0.7, "steps": 1.1, "save": 0.2})


def test_a_run_keeps_its_account_over_starts(tmp_path, one_device):
    options = FitOptions(log_every=5, checkpoint_every=10, progress=False, stop_after=15)
    with pytest.raises(Interrupted):
        fit(recipe(), workdir=tmp_path, mesh=one_device, options=options)
    fit(recipe(), workdir=tmp_path, mesh=one_device, options=FitOptions(progress=False))
    found = goodput(tmp_path)
    assert found.starts == 2
    assert found.lost.keys() >= {"start", "compile", "save", "restore", "restarts"}
    assert "repeated steps" not in found.lost  # it stopped at a save
    rows = [json.loads(line) for line in (tmp_path / FILE).read_text().splitlines()]
    wall = rows[-1]["time"] - rows[0]["start"]
    assert found.wall == pytest.approx(wall, abs=0.05)
    assert next(row["step"] for row in rows if row["start"] == rows[-1]["start"]) == 15


def test_only_the_steps_asked_for_are_traced(tmp_path, one_device):
    options = FitOptions(progress=False, profile=(4, 6))
    two = (phase("first", 5), phase("second", 5))
    fit(recipe(*two), workdir=tmp_path, mesh=one_device, options=options)
    found = sorted((tmp_path / "profile").rglob("*.xplane.pb"))
    steps = set()
    for file in found:
        for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
            for line in plane.lines:
                for event in line.events:
                    if event.name == "step":
                        steps.add(dict(event.stats)["step_num"])
    assert steps == {4, 5, 6}
    with pytest.raises(ConfigError, match="profile: needs a workdir"):
        fit(recipe(), mesh=one_device, options=options)


@pytest.mark.parametrize("text", ["10", "steps=5..2", "steps=0..3", "a..b"])
def test_wrong_steps_are_named(text):
    with pytest.raises(ConfigError, match="is not like steps="):
        traced_steps(text)
    assert traced_steps("steps=10..15") == traced_steps("10..15") == (10, 15)
