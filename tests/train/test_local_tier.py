"""The second tier of checkpoints: closer in time than the first, never another run's."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest

from jaxformer.observe.metrics import read_jsonl
from jaxformer.parallel.mesh import make_mesh
from jaxformer.storage.local import LocalTier
from jaxformer.train.fit import FitOptions, fit
from tests.train.problem import phase, recipe


@dataclasses.dataclass(frozen=True)
class Crash:
    """An evaluator that ends the run at step 9, as a lost peer would."""

    name: str = "crash"
    every: int = 9

    def __call__(self, state, context):
        if int(state.step) == 9:
            raise RuntimeError("lost")
        return {}


@pytest.fixture
def mesh():
    return make_mesh({"data": 2, "fsdp": 2}, jax.devices()[:4])


@pytest.fixture
def crashed(mesh, tmp_path):
    """A run with checkpoints at 5 and copies at 4, 6, 8, that ended at 9."""
    with pytest.raises(RuntimeError, match="lost"):
        fit(run(Crash()), workdir=tmp_path / "run", mesh=mesh, options=options(tmp_path))
    return tmp_path


def run(*evaluators):
    return recipe(phase("a", 3), phase("b", 12, seed=1, ema=0.9), evaluators=evaluators)


def options(folder, **changes):
    local = {"local_dir": str(folder / "disk"), "local_every": 2}
    return FitOptions(**{"log_every": 1, "checkpoint_every": 5, **local, **changes})


def same(a, b):
    pairs = zip(jax.tree.leaves(a.replace(key=0)), jax.tree.leaves(b.replace(key=0)), strict=True)
    return all(np.array_equal(x, y) for x, y in pairs)


def continued(folder, mesh, capsys, **changes):
    """The state at the end, and the step that the run continued at."""
    capsys.readouterr()
    state = fit(run(), workdir=folder / "run", mesh=mesh, options=options(folder, **changes))
    line = next(x for x in capsys.readouterr().err.splitlines() if " at step " in x)
    return state, int(line.split("at step ")[1].split()[0])


def copies(folder):
    return sorted((folder / "disk").rglob("*.npz"), key=lambda path: int(path.stem))


def test_the_later_tier_is_continued_bitwise(crashed, mesh, capsys):
    whole = fit(run(), mesh=mesh, workdir=crashed / "whole", options=FitOptions(log_every=1))
    assert [path.stem for path in copies(crashed)] == ["6", "8"]
    state, began = continued(crashed, mesh, capsys)
    assert began == 8 and same(state, whole)
    losses = [
        [(row["step"], row["loss"]) for row in read_jsonl(crashed / name / "metrics.jsonl")]
        for name in ("run", "whole")
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 15


def test_a_damaged_copy_is_passed_over(crashed, mesh, capsys):
    newest = copies(crashed)[-1]
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 4
    newest.write_bytes(data)
    assert continued(crashed, mesh, capsys)[1] == 6


def test_a_lost_disk_costs_steps_and_nothing_else(crashed, mesh, capsys):
    shutil.rmtree(crashed / "disk")
    assert continued(crashed, mesh, capsys)[1] == 5


def test_a_later_checkpoint_is_preferred(crashed, mesh, capsys):
    copies(crashed)[-1].unlink()
    copies(crashed)[-1].rename(copies(crashed)[-1].with_stem("4"))
    assert continued(crashed, mesh, capsys)[1] == 5


def test_a_new_run_in_the_same_place_does_not_see_the_old_one(crashed, mesh, capsys):
    shutil.rmtree(crashed / "run")
    assert continued(crashed, mesh, capsys)[1] == 0


def test_shards_are_kept_and_come_back(mesh, tmp_path):
    sharding = jax.NamedSharding(mesh, jax.P("fsdp", None))
    x = jax.device_put(jax.numpy.arange(24, dtype=jax.numpy.bfloat16).reshape(4, 6), sharding)
    tier = LocalTier(tmp_path, "gs://bucket/run")
    tier.save(3, {"x": x}, {"phase": "a"})
    tier.close()
    with np.load(*copies_of(tmp_path)) as file:
        assert sorted(file.files) == ["page", "x@0:2,0:6", "x@2:4,0:6"]  # once, not per replica
    again = LocalTier(tmp_path, "gs://bucket/run")
    assert again.newest(after=2) == [3] and again.newest(after=3) == []
    wanted = {"x": jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)}
    assert np.array_equal(again.restore(3, wanted)["x"], x)
    assert again.page(3) == {"phase": "a"}
    whole = jax.NamedSharding(mesh, jax.P())
    assert again.restore(3, {"x": jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole)}) is None


def copies_of(folder):
    return list(folder.rglob("*.npz"))
