"""Members of a sweep are the runs made alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.catalogue import load
from jaxformer.data.base import DeviceData, FixedData
from jaxformer.evaluation.evaluators import EachMember
from jaxformer.observe.metrics import read_jsonl
from jaxformer.recipe import ConfigError, Phase, Recipe
from jaxformer.train import optim
from jaxformer.train.fit import FitOptions, NonFiniteError, fit
from jaxformer.train.sweep import Sweep
from jaxformer.train.updates import GradientUpdate
from tests.train.problem import Regression, draw
from tests.train.test_fit import grow

SETTINGS = {"learning_rate": [1e-2, 1e-2, 3e-2], "weight_decay": [0.0, 0.1, 0.1]}
SEEDS = [0, 5, 5]
SHARED = FixedData(jax.device_get(draw(None, jax.random.split(jax.random.key(3), 16))))


def make(learning_rate, weight_decay=0.0, seed=0):
    """Two phases: drawn data and a restructured model, then shared data and an average."""
    rate = optim.schedule(learning_rate, 6, warmup=2)
    optimizer = optim.optimizer(optim.adamw(), rate, weight_decay=weight_decay, clip=1.0)
    drawn = DeviceData(draw, 16, seed + 7)
    phases = [
        Phase("drawn", 4, drawn, GradientUpdate(Regression(), optimizer)),
        Phase("shared", 2, SHARED, GradientUpdate(Regression(), optimizer, ema=0.5), enter=grow),
    ]
    return Recipe(Regression(), phases)


def run(recipe, mesh, seed=0, **more):
    options = FitOptions(progress=False, log_every=1, seed=seed, max_bad_steps=3)
    return fit(recipe, mesh=mesh, options=options, **more)


def close(a, b):
    def one(x, y):
        np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-6)

    jax.tree.map(one, a, b)


def test_each_member_is_the_run_made_alone(one_device):
    """Parameters, average, optimiser and all: same seed, same setting, through both phases."""
    sweep = Sweep(make, SEEDS, SETTINGS)
    state = run(sweep.recipe, one_device, seed=9)
    assert state.step == 6
    for index, seed in enumerate(SEEDS):
        setting = {name: values[index] for name, values in SETTINGS.items()}
        alone = run(make(**setting, seed=seed), one_device, seed=seed)
        member = sweep.member(state, index)
        close(dataclasses.replace(alone, key=0), dataclasses.replace(member, key=0))
        assert jnp.all(jax.random.key_data(alone.key) == jax.random.key_data(member.key))
    kernels = state.params["first"]["kernel"]
    assert kernels.shape == (3, 3, 5)
    assert all(np.any(kernels[i] != kernels[j]) for i, j in ((0, 1), (0, 2), (1, 2)))


def test_a_grid_has_every_combination():
    sweep = Sweep.grid(make, range(2), learning_rate=(0.1, 0.2), weight_decay=(0.0,))
    assert sweep.seeds == (0, 1, 0, 1)
    assert sweep.settings == {
        "learning_rate": (0.1, 0.1, 0.2, 0.2),
        "weight_decay": (0.0, 0.0, 0.0, 0.0),
    }


def test_members_are_measured_one_by_one(one_device, tmp_path):
    """In the loop and after it; the averaged weights are seen, as in a run of its own."""
    sweep = Sweep(make, SEEDS, SETTINGS)

    def measure(recipe, state):
        batch = {name: jnp.asarray(array) for name, array in SHARED.arrays.items()}
        output = recipe.task.loss(state.params, state.extra, batch, key=state.key, train=False)
        return {"loss": output.loss}

    recipe = dataclasses.replace(sweep.recipe, evaluators=[EachMember(sweep, measure)])
    state = run(recipe, one_device, workdir=tmp_path)
    averages = state.replace(params=state.extra["ema"])
    losses = sweep.each(measure, averages)["loss"]
    assert losses.shape == (3,)
    row = next(r for r in read_jsonl(tmp_path / "metrics.jsonl") if "members/loss/0" in r)
    found = [row[f"members/loss/{i}"] for i in range(3)]
    np.testing.assert_allclose(found, losses, rtol=1e-5)
    # The task of the sweep scores all of them together.
    batch = {name: jnp.asarray(array) for name, array in SHARED.arrays.items()}
    all_of_them = recipe.task.loss(
        averages.params, averages.extra, batch, key=state.key, train=False
    )
    np.testing.assert_allclose(all_of_them.loss, losses.mean(), rtol=1e-5)
    np.testing.assert_allclose(all_of_them.metrics["error"].value(), losses.mean(), rtol=1e-5)


def poisoned(poison):
    task = Regression(poison)
    update = GradientUpdate(task, optim.optimizer(optim.sgd(), optim.schedule(1e-2, 6)))
    return Recipe(task, [Phase("train", 6, DeviceData(draw, 16), update)])


def test_one_that_diverges_does_not_stop_the_others(one_device, tmp_path):
    sweep = Sweep(poisoned, [1, 1], {"poison": [1e9, -1e9]})
    state = run(sweep.recipe, one_device, workdir=tmp_path)
    healthy, stuck = (sweep.member(state, i) for i in (0, 1))
    assert np.any(healthy.params["second"]["kernel"] != 1)
    assert np.all(stuck.params["second"]["kernel"] == 1)
    rows = [r for r in read_jsonl(tmp_path / "metrics.jsonl") if "loss" in r]
    assert all(r["diverged"] == 0.5 and r["nonfinite"] == 0 for r in rows)
    with pytest.raises(NonFiniteError):
        run(Sweep(poisoned, [1, 1], {"poison": [-1e9, -1e9]}).recipe, one_device)


@pytest.mark.parametrize(
    ("seeds", "settings", "says"),
    [
        ([], {}, r"Sweep.seeds: \[\]; give one number for each member"),
        ([0, 1], {"rate": [0.1]}, r"Sweep.rate: \[0.1\]; give one number for each member"),
        ([0], {"name": ["adamw"]}, r"Sweep.name: \['adamw'\]; give one number"),
    ],
)
def test_what_is_refused(seeds, settings, says):
    with pytest.raises(ConfigError, match=says):
        Sweep(make, seeds, settings)


def test_a_configs_number_is_stored_as_it_is_or_traced():
    """Of an array there is its number in the recipe's config; of a member's nothing is lost."""
    kept = load("linear_icl:tiny", optim__learning_rate=np.float32(0.5)).config
    assert kept["optim"]["learning_rate"] == 0.5

    def rate(value):
        recipe = load("linear_icl:tiny", optim__learning_rate=value, optim__schedule="constant")
        return recipe.phases[0].update.optimizer.schedule(0)

    np.testing.assert_allclose(jax.vmap(rate)(jnp.array([0.1, 0.2])), [0.1, 0.2], rtol=1e-6)
