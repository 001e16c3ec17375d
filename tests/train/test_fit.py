"""The loop: phases, resume, evaluators, bad steps, signals."""

import dataclasses
import os
import signal
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxformer
from jaxformer.observe.metrics import read_jsonl
from jaxformer.recipe import ConfigError, InitFrom, Mean, Phase
from jaxformer.train import optim
from jaxformer.train.checkpoint import Checkpoints
from jaxformer.train.fit import FitOptions, Interrupted, NonFiniteError, fit
from jaxformer.train.states import restore, restore_averaged
from jaxformer.train.updates import ForwardUpdate, GradientUpdate
from tests.train.problem import Regression, draw, optimizer, phase, recipe

QUIET = FitOptions(progress=False, log_every=1, checkpoint_every=5, keep=None)


def run(r, mesh, workdir=None, **changes):
    return fit(r, workdir=workdir, mesh=mesh, options=dataclasses.replace(QUIET, **changes))


def same(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.array_equal(x, y) for x, y in pairs)


def grow(state):
    """A phase entry that restructures parameters: one more hidden unit."""
    first, second = state.params["first"], state.params["second"]
    wider = {
        "first": {
            "kernel": jnp.pad(first["kernel"], ((0, 0), (0, 1))),
            "bias": jnp.pad(first["bias"], (0, 1), constant_values=1.0),
        },
        "second": {"kernel": jnp.pad(second["kernel"], ((0, 1), (0, 0)))},
    }
    return state.replace(params=wider)


def chain():
    """Train, restructure without steps, train what came out."""
    return recipe(phase("a", 12), Phase("grow", enter=grow), phase("b", 8, seed=1, ema=0.9))


@pytest.mark.parametrize("stop", [3, 12, 17])
def test_resume_is_bitwise_in_every_phase(stop, one_device, tmp_path):
    whole = run(chain(), one_device, tmp_path / "whole")
    with pytest.raises(Interrupted, match=f"step {stop}"):
        run(chain(), one_device, tmp_path / "cut", stop_after=stop)
    continued = run(chain(), one_device, tmp_path / "cut")
    assert same(whole.replace(key=0), continued.replace(key=0))
    assert whole.params["first"]["bias"].shape == (5,)
    rows = [read_jsonl(tmp_path / name / "metrics.jsonl") for name in ("whole", "cut")]
    losses = [[(r["step"], r["phase"], r["loss"]) for r in part] for part in rows]
    assert losses[0] == losses[1] and len(losses[0]) == 20


def test_a_finished_run_is_left_alone(one_device, tmp_path):
    first = run(recipe(), one_device, tmp_path)
    again = run(recipe(), one_device, tmp_path)
    assert same(first.replace(key=0), again.replace(key=0)) and int(again.step) == 20


def test_a_changed_config_is_told(one_device, tmp_path, capsys):
    for width in (3, 4):
        r = recipe(phase("train", 2), config={"model": {"width": width}, "seed": 0})
        run(r, one_device, tmp_path, progress=True)
    assert "config.model/width: was 3, is now 4" in capsys.readouterr().err


def test_kernels_are_told_once(one_device, capsys):
    recipe = jaxformer.load("pfn:tiny", steps=2)
    jaxformer.fit(recipe, mesh=one_device)
    told = [line for line in capsys.readouterr().err.splitlines() if "attention of" in line]
    assert len(told) == 1 and "GFLOP" in told[0] and "on cpu" in told[0]  # it has two layers


def test_restructuring_without_steps_is_saved(one_device, tmp_path):
    r = recipe(phase("a", 4), Phase("grow", enter=grow))
    run(r, one_device, tmp_path)
    state = restore(r, tmp_path, mesh=one_device)
    assert state.params["first"]["bias"].shape == (5,) and int(state.step) == 4


@dataclasses.dataclass(frozen=True)
class Note:
    """An evaluator that notes when it ran and what it saw."""

    name: str
    every: Any
    seen: list

    def __call__(self, state, context):
        self.seen.append((int(state.step), context.phase))
        return {"bias": float(state.params["first"]["bias"][0])}


def test_evaluators_run_when_due(one_device, tmp_path):
    notes = [Note("six", 6, []), Note("phase", "phase_end", []), Note("end", "end", [])]
    r = recipe(phase("a", 12), phase("b", 8), evaluators=notes)
    run(r, one_device, tmp_path)
    # Steps of the run, ends of phases; everything at the very end. 12 is an end, not inside.
    assert notes[0].seen == [(6, "a"), (18, "b"), (20, "b")]
    assert notes[1].seen == [(12, "a"), (20, "b")]
    assert notes[2].seen == [(20, "b")]
    assert any("phase/bias" in row for row in read_jsonl(tmp_path / "metrics.jsonl"))


def test_evaluators_see_the_average(one_device, tmp_path):
    note = Note("note", "end", [])
    r = recipe(phase("a", 6, ema=0.5), evaluators=[note])
    state = run(r, one_device, tmp_path)
    row = next(row for row in read_jsonl(tmp_path / "metrics.jsonl") if "note/bias" in row)
    assert row["note/bias"] == pytest.approx(float(state.extra["ema"]["first"]["bias"][0]))
    assert row["note/bias"] != pytest.approx(float(state.params["first"]["bias"][0]))
    _, averaged = restore_averaged(r, tmp_path, mesh=one_device)
    assert same(averaged.params, state.extra["ema"])


def test_micro_batches_equal_the_whole_with_uneven_weights(one_device):
    def weighted(step_key, row_keys):
        rows = draw(step_key, row_keys)
        return {**rows, "weight": (rows["x"][:, 1] > -0.5).astype(jnp.float32)}

    def state(accumulate):
        p = phase("a", 5, accumulate=accumulate)
        data = dataclasses.replace(p.data, draw_rows=weighted)
        return run(recipe(dataclasses.replace(p, data=data)), one_device)

    one, four = state(1), state(4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), one.params, four.params)
    assert float(one.extra["seen"]) == float(four.extra["seen"]) == 80


def test_bad_steps_change_nothing_and_are_counted(one_device, tmp_path):
    r = recipe(phase("a", 20, task=Regression(poison=2.4)))
    run(r, one_device, tmp_path)
    rows = read_jsonl(tmp_path / "metrics.jsonl")
    bad = [row["step"] for row in rows if row["nonfinite"]]
    assert 0 < len(bad) < 20
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps() == [5, 10, 15, 20]
    state = restore(r, tmp_path, mesh=one_device)
    assert np.isfinite(state.params["first"]["kernel"]).all()
    assert int(state.opt_state["count"]) == 20 - len(bad)


def test_too_many_bad_steps_stop_the_run(one_device, tmp_path):
    r = recipe(phase("a", 50, task=Regression(poison=-9.0)))
    with pytest.raises(NonFiniteError, match=r"learning_rate.*clip"):
        run(r, one_device, tmp_path, max_bad_steps=7)
    state = restore(r, tmp_path, mesh=one_device)
    assert int(state.step) <= 9 and np.isfinite(state.params["first"]["kernel"]).all()


def test_sigterm_saves_and_leaves(one_device, tmp_path):
    @dataclasses.dataclass(frozen=True)
    class Kill:
        name: str = "kill"
        every: int = 4

        def __call__(self, state, context):
            if int(state.step) == 4:
                os.kill(os.getpid(), signal.SIGTERM)
            return {}

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted, match="run again"):
        run(recipe(phase("a", 20), evaluators=[Kill()]), one_device, tmp_path, checkpoint_every=0)
    assert signal.getsignal(signal.SIGTERM) is before
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps() == [5]


def test_checkpoints_by_minutes_and_tensorboard(one_device, tmp_path):
    changes = {"checkpoint_every": 0, "checkpoint_minutes": 0.0, "tensorboard": True}
    run(recipe(phase("a", 3)), one_device, tmp_path, **changes)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps() == [1, 2, 3]
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"learning_rate" in events.read_bytes()


def test_start_from_another_run(one_device, tmp_path):
    trained = run(recipe(), one_device, tmp_path / "source")
    source = InitFrom(str(tmp_path / "source"), fresh="second")
    state = run(recipe(phase("none", 0), init_from=source), one_device)
    assert same(state.params["first"], trained.params["first"])
    assert not same(state.params["second"], trained.params["second"])
    with pytest.raises(ConfigError, match=r"nothing in .* gives parameter 'first/bias'"):
        moved = InitFrom(str(tmp_path / "source"), mapping=[("^first", "encoder")])
        run(recipe(phase("none", 0), init_from=moved), one_device)


def test_forward_update_folds_into_extra(one_device):
    def collect(state, batch, key):
        peak = jnp.maximum(state.extra.get("peak", 0.0), jnp.abs(batch["x"]).max())
        return {**state.extra, "peak": peak}, {"peak": Mean.of(peak)}

    def observe(state):
        return state.replace(extra={**state.extra, "peak": jnp.zeros(())})

    p = dataclasses.replace(phase("c", 4), update=ForwardUpdate(collect), enter=observe)
    state = run(recipe(p), one_device)
    data = phase("c", 4).data
    peaks = [float(jnp.abs(data.draw(data.batch(k))["x"]).max()) for k in range(4)]
    assert float(state.extra["peak"]) == pytest.approx(max(peaks))


def test_a_batch_that_does_not_fit_the_mesh_is_named():
    from jaxformer.parallel.mesh import make_mesh

    with pytest.raises(ConfigError, match=r"batch_size: 12 rows.*8 devices.*multiple of 8"):
        fit(recipe(phase("a", 2, batch_size=12)), mesh=make_mesh(), options=QUIET)


def test_recipes_and_checkpoints_that_do_not_fit_are_named(one_device, tmp_path):
    run(recipe(), one_device, tmp_path)
    other = recipe(phase("other", 20))
    with pytest.raises(ConfigError, match=r"phase 'train', this recipe has other"):
        restore(other, tmp_path, mesh=one_device)
    momentum = recipe(phase("train", 20, factory=optim.sgd(0.9)))
    with pytest.raises(ConfigError, match=r"lacks 'opt_state"):
        restore(momentum, tmp_path, mesh=one_device)
    with pytest.raises(ConfigError, match=r"step: 7 is not in .*saved steps: 5, 10, 15, 20"):
        restore(recipe(), tmp_path, step=7, mesh=one_device)
    with pytest.raises(ConfigError, match=r"workdir: no checkpoints in"):
        restore(recipe(), tmp_path / "nowhere", mesh=one_device)
    with pytest.raises(ConfigError, match="unique"):
        recipe(phase("a", 1), phase("a", 1))


def test_data_errors_reach_the_user(one_device):
    @dataclasses.dataclass(frozen=True)
    class Broken:
        batch_size: int = 8

        def spec(self):
            return {
                "x": jax.ShapeDtypeStruct((8, 3), jnp.float32),
                "y": jax.ShapeDtypeStruct((8,), jnp.float32),
            }

        def batch(self, step, rows=slice(None)):
            if step == 3:
                raise ConfigError("data.text: 'x.txt' is gone")
            return {"x": np.ones((8, 3), np.float32)[rows], "y": np.ones(8, np.float32)[rows]}

    update = GradientUpdate(Regression(), optimizer(9))
    with pytest.raises(ConfigError, match="is gone"):
        run(recipe(Phase("a", 9, Broken(), update)), one_device)
