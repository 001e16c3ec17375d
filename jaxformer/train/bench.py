"""What the loop and its checkpoints cost: `jaxformer bench loop | sweep | checkpoint`."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import resource
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from jaxformer.data.base import DeviceData
from jaxformer.parallel.mesh import make_mesh
from jaxformer.parallel.multihost import all_say, several
from jaxformer.parallel.sharding import host_rows, place_batch
from jaxformer.recipe import Batch, EvalContext, LossOutput, Mean, Phase, Recipe, TrainState
from jaxformer.train import optim
from jaxformer.train.checkpoint import Checkpoints
from jaxformer.train.fit import FitOptions, fit
from jaxformer.train.states import abstract_states, enter, initialise, step_function
from jaxformer.train.sweep import Sweep
from jaxformer.train.updates import GradientUpdate


@dataclasses.dataclass(frozen=True)
class _Products:
    """A task of `depth` matrix products of size `width`, to set the length of a step."""

    width: int
    depth: int

    def init(self, key: jax.Array, batch: Batch) -> tuple[Any, Any]:
        shape = (self.depth, self.width, self.width)
        return {"kernel": jax.random.normal(key, shape) * self.width**-0.5}, {}

    def loss(self, params: Any, extra: Any, batch: Batch, *, key: Any, train: bool) -> LossOutput:
        y, _ = jax.lax.scan(lambda y, w: (jnp.tanh(y @ w), None), batch["x"], params["kernel"])
        mean = Mean.of(y**2)
        return LossOutput(mean.value(), mean.weight, {}, extra)


def _recipe(width: int, depth: int, rows: int, steps: int) -> Recipe:
    def draw(step_key: jax.Array, row_keys: jax.Array) -> Batch:
        return {"x": jax.vmap(lambda key: jax.random.normal(key, (width,)))(row_keys)}

    task = _Products(width, depth)
    update = GradientUpdate(task, optim.optimizer(optim.adamw(), optim.schedule(1e-4, steps)))
    return Recipe(task, [Phase("train", steps, DeviceData(draw, rows), update)])


def _bare_seconds(recipe: Recipe) -> float:
    """Seconds per step of a plain `for` loop over the same jitted step, in its second half."""
    mesh = make_mesh()
    phase = recipe.phases[0]
    assert phase.data is not None
    step = step_function(phase, abstract_states(recipe, mesh)[1], mesh)
    with jax.set_mesh(mesh):
        state = jax.jit(functools.partial(enter, phase))(initialise(recipe, mesh, 0))
        for k in range(phase.steps):
            if k == phase.steps // 2:
                jax.block_until_ready(state)
                start = time.perf_counter()
            batch = phase.data.batch(k, host_rows(phase.data, mesh))
            state, _ = step(state, place_batch(batch, mesh, phase.data.batch_size))
        jax.block_until_ready(state)
    return (time.perf_counter() - start) / (phase.steps - phase.steps // 2)


@dataclasses.dataclass(frozen=True)
class _Clock:
    """An evaluator that notes the time."""

    every: int
    times: list[float]
    name: str = "clock"

    def __call__(self, state: TrainState, context: EvalContext) -> dict[str, float]:
        jax.block_until_ready(state)
        self.times.append(time.perf_counter())
        return {}


def _fit_seconds(recipe: Recipe, workdir: str) -> float:
    """Seconds per step of `fit` in its second half, metrics written as in any run."""
    half = recipe.steps // 2
    clock = _Clock(half, [])
    timed = dataclasses.replace(recipe, evaluators=[clock])
    fit(timed, workdir=workdir, options=FitOptions(progress=False))
    return (clock.times[-1] - clock.times[0]) / (recipe.steps - half)


@contextlib.contextmanager
def _common_folder() -> Iterator[str]:
    """A temporary folder that all processes of this run share, if they are on one machine."""
    with tempfile.TemporaryDirectory() as mine:
        name = np.zeros(1024, np.uint8)
        name[: len(mine.encode())] = list(mine.encode())
        name = multihost_utils.broadcast_one_to_all(name) if several() else name
        yield bytes(name).rstrip(b"\0").decode()
        all_say(True)  # nobody removes it while another still writes


def bench_loop(repeats: int = 5) -> list[dict[str, Any]]:
    """`fit` against a bare loop over the same step, at three lengths of the step; medians."""
    rows = []
    for width, depth, batch, steps in ((32, 1, 8, 2000), (256, 4, 64, 400), (768, 8, 512, 40)):
        recipe = _recipe(width, depth, batch, steps)
        bare, looped = [], []
        for _ in range(repeats):  # interleaved, so that a slow spell of the machine hits both
            bare.append(_bare_seconds(recipe))
            with _common_folder() as workdir:
                looped.append(_fit_seconds(recipe, workdir))
        plain, ours = statistics.median(bare), statistics.median(looped)
        rows.append(
            {
                "bare ms/step": 1e3 * plain,
                "fit ms/step": 1e3 * ours,
                "overhead ms/step": 1e3 * (ours - plain),
                "fit / bare": ours / plain,
            }
        )
    return rows


def bench_sweep(members: int = 32, repeats: int = 3) -> list[dict[str, Any]]:
    """A sweep of `members` seeds against one of them alone, at three sizes of model; medians."""
    rows = []
    for width, depth, batch, steps in ((16, 2, 16, 1000), (32, 2, 32, 600), (64, 2, 64, 100)):
        make = functools.partial(_recipe, width, depth, batch, steps)
        sweep = Sweep(make, range(members))
        alone, together = [], []
        for _ in range(repeats):
            with _common_folder() as first, _common_folder() as second:
                alone.append(_fit_seconds(make(), first))
                together.append(_fit_seconds(sweep.recipe, second))
        one, many = statistics.median(alone), statistics.median(together)
        rows.append(
            {
                "width": width,
                "rows": batch,
                "one ms/step": 1e3 * one,
                f"{members} ms/step": 1e3 * many,
                "sweep / one": many / one,
            }
        )
    return rows


def _resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def bench_checkpoint(mebibytes: int = 512, saves: int = 50) -> list[dict[str, Any]]:
    """How long an asynchronous save holds the loop, and what many saves leave in memory."""
    big = _random_state(mebibytes)
    stalls = []
    with tempfile.TemporaryDirectory() as workdir, Checkpoints(workdir, keep=1) as checkpoints:
        for step in range(5):
            start = time.perf_counter()
            checkpoints.save(step, big, {"phase": "train"})
            stalls.append(time.perf_counter() - start)
            checkpoints.wait()
    del big
    small, resident = _random_state(32), []
    with tempfile.TemporaryDirectory() as workdir, Checkpoints(workdir, keep=1) as checkpoints:
        for step in range(saves):
            checkpoints.save(step, small, {"phase": "train"})
            checkpoints.wait()
            resident.append(_resident_mib())
    settled = resident[saves // 10]
    return [
        {
            f"stall ms, {mebibytes} MiB": 1e3 * statistics.median(stalls),
            "worst stall ms": 1e3 * max(stalls),
            "resident MiB, early": settled,
            f"resident MiB, after {saves} saves": resident[-1],
            "growth": resident[-1] / settled - 1,
        }
    ]


def _random_state(mebibytes: int) -> TrainState:
    """Random parameters: constants would compress and flatter the disk."""
    parts = 16
    shape = (mebibytes * 2**20 // 4 // parts,)
    keys = jax.random.split(jax.random.key(0), parts)
    params = {f"part_{i}": jax.random.normal(key, shape) for i, key in enumerate(keys)}
    state = TrainState(jnp.zeros((), jnp.int32), params, {}, {}, jax.random.key(0))
    return jax.block_until_ready(state)
