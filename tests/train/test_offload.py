"""The optimiser's moments in the host's memory: same numbers, other place."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxformer import paths
from jaxformer.parallel.mesh import make_mesh
from jaxformer.train import optim
from jaxformer.train.fit import FitOptions, Interrupted, fit
from jaxformer.train.states import averaged
from tests.train.problem import phase, recipe

QUIET = FitOptions(progress=False)


def offloaded(**more):
    one = phase("train", 20, **more)
    return recipe(dataclasses.replace(one, update=dataclasses.replace(one.update, offload=True)))


def kinds(state):
    return {n: x.sharding.memory_kind for n, x in paths.leaves(state).items()}


def test_offloaded_moments_give_the_same_run_and_resume(tmp_path):
    mesh = make_mesh({"data": 2}, jax.devices()[:2])
    plain = fit(recipe(phase("train", 20)), mesh=mesh, options=QUIET)
    with pytest.raises(Interrupted):
        stop = dataclasses.replace(QUIET, stop_after=8)
        fit(offloaded(), workdir=tmp_path, mesh=mesh, options=stop)
    moved = fit(offloaded(), workdir=tmp_path, mesh=mesh, options=QUIET)
    on_host = {n for n, kind in kinds(moved).items() if kind == "pinned_host"}
    moments = {n for n, x in paths.leaves(moved).items() if "/mu/" in n or "/nu/" in n}
    assert on_host == moments != set()
    for name, x in paths.leaves(plain.replace(key=0)).items():
        np.testing.assert_array_equal(paths.leaves(moved.replace(key=0))[name], x, name)


def test_an_average_that_is_kept_on_the_host_is_read():
    task = {"factory": optim.schedule_free()}
    mesh = make_mesh({"data": 1}, jax.devices()[:1])
    found = []
    for one in (offloaded(**task), recipe(phase("train", 20, **task))):
        state = fit(one, mesh=mesh, options=QUIET)
        found.append(averaged(one.phases[0].update, state).params)
    jax.tree.map(np.testing.assert_array_equal, *found)
