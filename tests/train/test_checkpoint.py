"""Checkpoints: the layout is a public contract."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxformer import paths
from jaxformer.observe.metrics import Jsonl, read_jsonl
from jaxformer.recipe import ConfigError
from jaxformer.train import checkpoint
from jaxformer.train.checkpoint import Checkpoints
from jaxformer.train.fit import FitOptions, fit
from jaxformer.train.states import restore
from tests.train.problem import phase, recipe

GOLDEN = Path(__file__).parent / "golden_checkpoint"
OPTIONS = FitOptions(progress=False)


def golden_recipe():
    return recipe(phase("train", 3, ema=0.9))


def write_golden(mesh):
    """Run with JAXFORMER_WRITE_GOLDEN=1 after a change of layout, together with a migration."""
    shutil.rmtree(GOLDEN, ignore_errors=True)
    state = fit(golden_recipe(), workdir=GOLDEN, mesh=mesh, options=OPTIONS)
    arrays = {k: np.asarray(v) for k, v in checkpoint.flatten(state).items()}
    np.savez(GOLDEN / "arrays.npz", **arrays)
    (GOLDEN / "metrics.jsonl").unlink()
    for note in GOLDEN.rglob("commit_success.txt"):
        note.write_text("done\n")  # it names the folder it was written in


def test_the_committed_checkpoint_loads(one_device, tmp_path):
    if os.environ.get("JAXFORMER_WRITE_GOLDEN"):
        write_golden(one_device)
    shutil.copytree(GOLDEN, tmp_path / "run")  # reading must not touch the committed files
    state = restore(golden_recipe(), tmp_path / "run", mesh=one_device)
    with np.load(GOLDEN / "arrays.npz") as expected:
        found = checkpoint.flatten(state)
        assert set(found) == set(expected.files)
        for name in expected.files:
            assert np.array_equal(found[name], expected[name]), name


def test_an_older_layout_is_migrated(one_device, tmp_path, monkeypatch):
    fit(golden_recipe(), workdir=tmp_path, mesh=one_device, options=OPTIONS)
    before = restore(golden_recipe(), tmp_path, mesh=one_device)

    @dataclasses.dataclass(frozen=True)
    class Renamed:
        """The same task, whose first layer got another name in layout 2."""

        task: object

        def init(self, key, batch):
            params, extra = self.task.init(key, batch)
            return {"stem": params["first"], "second": params["second"]}, extra

        def loss(self, params, extra, batch, **more):
            params = {"first": params["stem"], "second": params["second"]}
            return self.task.loss(params, extra, batch, **more)

    monkeypatch.setattr(checkpoint, "LAYOUT", 2)
    monkeypatch.setattr(checkpoint, "MIGRATIONS", {1: lambda name: name.replace("stem", "first")})
    old = golden_recipe()
    renamed = dataclasses.replace(old, task=Renamed(old.task))
    after = restore(renamed, tmp_path, mesh=one_device)
    assert np.array_equal(after.params["stem"]["kernel"], before.params["first"]["kernel"])
    monkeypatch.setattr(checkpoint, "LAYOUT", 0)
    with pytest.raises(ConfigError, match=r"layout 1 is newer.*upgrade jaxformer"):
        restore(renamed, tmp_path, mesh=one_device)


def test_only_wanted_arrays_are_read(one_device, tmp_path):
    state = fit(golden_recipe(), workdir=tmp_path, mesh=one_device, options=OPTIONS)
    names = [name for name in checkpoint.flatten(state) if name.startswith("params/")]
    wanted = {k: v for k, v in checkpoint.flatten(state).items() if k in names}
    abstract = {
        k: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=v.sharding) for k, v in wanted.items()
    }
    with Checkpoints(tmp_path) as checkpoints:
        assert set(checkpoints.saved(3)) > set(names)
        found = checkpoints.restore_arrays(3, abstract)
        assert all(np.array_equal(found[name], wanted[name]) for name in names)
        wrong = jax.ShapeDtypeStruct((9, 9), np.float32)
        with pytest.raises(ConfigError, match=r"'params/first/kernel' has shape \(3, 4\)"):
            checkpoints.restore_arrays(3, {"params/first/kernel": wrong})


def test_the_page_says_what_wrote_it(one_device, tmp_path):
    r = dataclasses.replace(golden_recipe(), config={"paper": "x", "steps": 3})
    fit(r, workdir=tmp_path, mesh=one_device, options=OPTIONS)
    with Checkpoints(tmp_path) as checkpoints:
        page = checkpoints.meta(3)
    assert page["config"] == {"paper": "x", "steps": 3} and page["phase"] == "train"
    assert page["step"] == 3 and page["layout"] == checkpoint.LAYOUT
    assert {"jax", "jaxformer"} <= page["versions"].keys()


def test_old_checkpoints_are_dropped_but_every_nth_is_kept(one_device, tmp_path):
    options = FitOptions(progress=False, checkpoint_every=2, keep=2, keep_every=6)
    fit(recipe(phase("train", 14)), workdir=tmp_path, mesh=one_device, options=options)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps() == [6, 12, 14]


def test_an_unfinished_write_is_not_a_checkpoint(one_device, tmp_path):
    fit(golden_recipe(), workdir=tmp_path, mesh=one_device, options=OPTIONS)
    saved = tmp_path / "checkpoints"
    shutil.copytree(saved / "3", saved / "9.orbax-checkpoint-tmp-1")
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps() == [3]


def test_names_nest_and_refill():
    tree = {"a": [1, {"b": 2}], "c": 3}
    named = paths.leaves(tree)
    assert named == {"a/0": 1, "a/1/b": 2, "c": 3}
    assert paths.nest(named) == {"a": {"0": 1, "1": {"b": 2}}, "c": 3}
    assert paths.refill(tree, {k: v * 10 for k, v in named.items()}) == {
        "a": [10, {"b": 20}],
        "c": 30,
    }


def test_metrics_files_survive_a_cut_line_and_resume(tmp_path):
    path = tmp_path / "metrics.jsonl"
    sink = Jsonl(path)
    for step in range(1, 6):
        sink.write({"step": step, "loss": float("nan") if step == 2 else 1.0})
    sink.close()
    path.write_text(path.read_text() + '{"step": 6, "lo')
    assert [row["step"] for row in read_jsonl(path)] == [1, 2, 3, 4, 5]
    assert json.loads(path.read_text().splitlines()[1])["loss"] is None
    Jsonl(path, resume_at=3).close()
    assert [row["step"] for row in read_jsonl(path)] == [1, 2, 3]
