"""The faults of `jaxformer soak` on a shorter run: real processes, really hit.

Truncated and missing files are in tests/train/test_damage.py, SIGTERM and other numbers of
processes in test_loopback.py; all of them are in the soak.
"""

import math
import random
import shutil

import pytest

from jaxformer.soak import CACHE
from jaxformer.soak.faults import inject
from jaxformer.soak.kills import MOMENTS, kill_once, kill_round
from jaxformer.soak.trainees import Trial, Violation, saved

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trial(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        for name, value in CACHE.items():
            patch.setenv(name, value)
        trial = Trial(tmp_path_factory.mktemp("faults"), steps=50)
        trial.prepare()
        yield trial


def test_kills_lose_nothing(trial):
    kills = []
    said = kill_round(trial, trial.folder / "kills", random.Random(3), kills, math.inf, kills=2)
    assert "bitwise equal" in said and kills
    for kill in kills:
        assert kill["moment"] in MOMENTS and kill["others"]


@pytest.mark.parametrize(
    "fault, words",
    [
        ("full_disk", ("disk", "bitwise equal")),
        ("flipped_bit", ("checkpoint 30 is damaged and skipped", "continue at step 20")),
        ("stalled_data", ("process 1 of 2 stands still", "reading the batch of step 1")),
        ("hung_peer", ("process 0 of 2 stands still", "bitwise equal")),
        ("port_conflict", ("check that every process runs", "port is free")),
        ("clocks", ("no effect", "bitwise equal")),
    ],
)
def test_a_fault_is_a_line_and_costs_nothing(trial, fault, words):
    said = inject(fault, trial)
    for part in words:
        assert part in said, said


def test_a_violation_would_be_noticed(trial):
    """A run that began elsewhere, or ended elsewhere, does not pass."""
    workdir = trial.folder / "bad"
    shutil.copytree(trial.whole, workdir)
    rows = workdir / "metrics.jsonl"
    text = rows.read_text()
    rows.write_text(text.replace('"step": 7,', '"step": 7, "extra": 1,'))
    with pytest.raises(Violation, match="first at"):
        trial.check_equal(workdir)
    rows.write_text(text)
    shutil.rmtree(workdir / "checkpoints" / str(saved(workdir)[-1]))
    with pytest.raises(Violation, match="final arrays differ"):
        trial.check_equal(workdir)
    # A finished checkpoint is damaged behind the run's back: it begins before it.
    newest = workdir / "checkpoints" / str(saved(workdir)[-1]) / "state" / "manifest.ocdbt"
    newest.write_bytes(newest.read_bytes()[:-1])
    with pytest.raises(Violation, match="was finished; the run began at"):
        kill_once(trial, workdir, random.Random(0), "prefetch")
