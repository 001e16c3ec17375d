"""The one loop. It knows phases, checkpoints and evaluators, and nothing about any paper."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Generator
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh

from jaxformer import paths
from jaxformer.data.base import prefetch
from jaxformer.errors import STOPPED, Agreed
from jaxformer.kernels.told import told
from jaxformer.observe.goodput import Goodput
from jaxformer.observe.metrics import Jsonl, Progress, Sink, TensorBoard
from jaxformer.observe.trace import Trace
from jaxformer.observe.watchdog import Watchdog
from jaxformer.parallel.mesh import make_mesh
from jaxformer.parallel.multihost import first_says, several, stop_signals, told_to_stop
from jaxformer.parallel.sharding import host_rows, place_batch
from jaxformer.recipe import Batch, EvalContext, Evaluator, Metrics, Phase, Recipe, TrainState
from jaxformer.storage.local import LocalTier
from jaxformer.storage.places import AnyPath, place
from jaxformer.train.checkpoint import Checkpoints, flatten, unflatten
from jaxformer.train.states import (
    abstract_states,
    averaged,
    enter,
    initialise,
    saved_phase,
    shardings,
    step_function,
)
from jaxformer.train.updates import merge


class NonFiniteError(Agreed):
    """Too many steps in a row gave a loss or gradient that is not finite."""


class Interrupted(Agreed):
    """A signal ended the run after a checkpoint was written; the same command continues it."""


@dataclasses.dataclass(frozen=True)
class FitOptions:
    """How to run, as opposed to what: nothing here changes the numbers of a run."""

    seed: int = 0
    log_every: int = 20  # steps
    checkpoint_every: int = 0  # steps; 0: only at phase ends
    checkpoint_minutes: float = 10.0  # and at least this often
    local_dir: str = ""  # on a local disk of each host: a second tier of checkpoints
    local_every: int = 0  # steps between its copies; 0: no such tier
    keep: int | None = 3  # newest checkpoints to keep
    keep_every: int | None = None  # and every n-th step for good
    max_bad_steps: int = 20  # non-finite steps in a row before the run stops
    tensorboard: bool = False
    progress: bool = True
    hang_minutes: float = 0.0  # a process that stands still so long is ended; 0: it waits for ever
    stop_after: int | None = None  # leave at this global step, as if interrupted
    profile: tuple[int, int] | None = None  # first and last step of a trace in workdir/profile


DEFAULTS = FitOptions()


def fit(
    recipe: Recipe,
    *,
    workdir: AnyPath | None = None,
    mesh: Mesh | None = None,
    options: FitOptions = DEFAULTS,
) -> TrainState:
    """Run a recipe to its end, continuing from the newest checkpoint in `workdir` if there is one.

    Without a `workdir` nothing is written. Returns the last state.

    Raises:
        ConfigError: the recipe and the checkpoint, the batch or the mesh do not fit.
        NonFiniteError: after `options.max_bad_steps` such steps in a row; a checkpoint is saved.
        Interrupted: on SIGTERM, SIGINT or `options.stop_after`, once a checkpoint is saved.
        CheckpointFailed: a checkpoint could not be written, as on a full disk.
        CheckpointDamaged: `workdir` has checkpoints and not one is whole.
    """
    mesh = mesh or make_mesh()
    with contextlib.ExitStack() as stack:
        run = _Run(recipe, mesh, options, place(workdir) if workdir else None, stack)
        stack.enter_context(jax.set_mesh(mesh))
        for index in range(run.first_phase, len(recipe.phases)):
            run.phase(index)
        return run.state


class _Run:
    """One call of `fit`: the state, its host-side step counter and what is written on the way."""

    def __init__(
        self,
        recipe: Recipe,
        mesh: Mesh,
        options: FitOptions,
        workdir: epath.Path | None,
        stack: contextlib.ExitStack,
    ) -> None:
        self.recipe, self.mesh, self.options, self.workdir = recipe, mesh, options, workdir
        self.step = 0  # a Python int: reading state.step would wait for the device
        self.progress: Progress | None = None
        self.sinks: list[Sink] = []
        self.rows: Jsonl | None = None
        self.checkpoints: Checkpoints | None = None
        self.local: LocalTier | None = None
        self.doing: Callable[..., object] = lambda what, **_: None
        if options.hang_minutes:
            self.doing = stack.enter_context(Watchdog(options.hang_minutes, STOPPED)).doing
        if workdir is not None:
            workdir.mkdir(parents=True, exist_ok=True)
        self.goodput = Goodput(workdir if jax.process_index() == 0 else None)
        stack.callback(lambda: self.goodput.close(self.step))
        if workdir is not None:
            self.checkpoints = stack.enter_context(
                Checkpoints(workdir, keep=options.keep, keep_every=options.keep_every)
            )
            if options.local_every:
                self.local = LocalTier(options.local_dir, workdir)
                stack.callback(self.local.close)
        self.abstract = abstract_states(recipe, mesh)
        self.first_phase, self.resumed = 0, False
        newest = self.checkpoints.newest() if self.checkpoints else None
        if self.checkpoints and newest is not None:
            self.step = newest
            page = self.checkpoints.meta(self.step)
            index = saved_phase(recipe, page)
            self.first_phase, self.resumed = max(index, 0), index >= 0
            with jax.set_mesh(mesh), self.goodput.spent("restore"):
                self.state = self.checkpoints.restore(self.step, self.abstract[index + 1])
                page = self._closer() or page
        else:
            with jax.set_mesh(mesh):
                self.state = initialise(recipe, mesh, options.seed)
        self._open_sinks(stack)
        stack.callback(self.goodput.book, "save")  # at the end the last checkpoint is waited for
        self.goodput.write(self.step)
        self.trace = Trace(options.profile, workdir, self.status)
        self.stop = stack.enter_context(stop_signals())
        self.stopping = False
        self.saved_at = time.monotonic()
        self.bad_steps = 0
        going = "continue" if self.resumed else "start"
        self.status(f"{going} at step {self.step} of {recipe.steps}")
        if self.local:
            self.local.forget(after=self.step)
        if self.resumed:
            was, now = (paths.leaves(c) for c in (page["config"], dict(recipe.config)))
            for name in sorted(name for name in was | now if was.get(name) != now.get(name)):
                self.status(f"config.{name}: was {was.get(name)}, is now {now.get(name)}")

    def _closer(self) -> dict[str, Any] | None:
        """Continue from a later step of the local tier, if all have one; its page."""
        local = self.local
        if local is None:
            return None
        for step in local.newest(self.step):
            page = local.page(step)
            phase = saved_phase(self.recipe, page) if page else 0
            abstract = self.abstract[phase + 1]
            arrays = local.restore(step, flatten(abstract))
            if arrays is not None:
                self.step, self.first_phase, self.resumed = step, phase, True
                self.state = unflatten(arrays, abstract)
                return page
        return None

    def _open_sinks(self, stack: contextlib.ExitStack) -> None:
        if jax.process_index() != 0:
            return
        if self.options.progress:
            self.progress = Progress(self.recipe.steps, self.step, self.recipe.unit)
            self.sinks.append(self.progress)
        if self.workdir is not None:
            self.rows = Jsonl(self.workdir / "metrics.jsonl", resume_at=self.step)
            self.sinks.append(self.rows)
            if self.options.tensorboard:
                self.sinks.append(TensorBoard(self.workdir / "tensorboard"))
        for sink in self.sinks:
            stack.callback(sink.close)

    def status(self, text: str) -> None:
        if self.progress is not None:
            self.progress.status(text)

    def phase(self, index: int) -> None:
        """Enter a phase (unless resumed inside it), take its steps, evaluate and save."""
        phase = self.recipe.phases[index]
        end = sum(p.steps for p in self.recipe.phases[: index + 1])
        resumed, self.resumed = self.resumed, False
        if resumed and self.step == end:
            return  # saved after all its work was done
        if not resumed:
            self.status(f"enter phase {phase.name}: {phase.steps} steps")
            out = shardings(self.abstract[index + 1])
            go = jax.jit(functools.partial(enter, phase), out_shardings=out)
            self.state = jax.block_until_ready(go(self.state))
        if phase.steps:
            with self.goodput.spent("steps"):
                self._steps(phase, index, end)
        last = index == len(self.recipe.phases) - 1
        self._evaluate(phase, [e for e in self.recipe.evaluators if last or e.every == "phase_end"])
        self._save(phase)
        if not last:
            self._leave_if_stopped()

    def _steps(self, phase: Phase, index: int, end: int) -> None:
        """Step until `end`; evaluate, save and leave on the way where that is due."""
        step = step_function(phase, self.abstract[index + 1], self.mesh)
        window, guard, dispatched = _Window(), "allow", 0.0
        pending: collections.deque[tuple[int, Metrics]] = collections.deque()
        with (
            told(self.status),
            contextlib.closing(self.trace),
            contextlib.closing(self._batches(phase, self.step - end + phase.steps)) as batches,
        ):
            while self.step < end:
                self.doing(f"reading the batch of step {self.step + 1}", data=True)
                with self.goodput.waiting_for_data(dispatched):
                    batch = next(batches)
                self.doing(f"in step {self.step + 1}")
                # Placing batches and fetching metrics are explicit; anything else that would
                # cross between host and device inside a step is a bug, and raises. Tracing, in
                # the first call, may make constants.
                first = guard == "allow"
                with (
                    self.trace.step(self.step + 1, self.state),
                    self.goodput.spent("compile" if first else "steps"),
                    jax.transfer_guard(guard),
                ):
                    self.state, metrics = step(self.state, batch)
                guard, dispatched = "disallow", time.monotonic()
                self.step += 1
                pending.append((self.step, metrics))
                # Metrics are read one step late: while the device works on this step the host
                # waits for the one before, so at most two steps are in flight.
                inside = self.step < end
                due = self._due() if inside else []
                self.stopping = self._told_to_stop()
                save = inside and (self._save_due() or self.stopping)
                copy = self.local and inside and self.step % self.options.local_every == 0
                drain = due or save or copy or not inside
                while len(pending) > (0 if drain or first else 1):
                    self._read(phase, window, *pending.popleft())
                if not pending:
                    self.goodput.finished(dispatched)
                if drain:
                    self._log(phase, window)
                self._evaluate(phase, due)
                if save:
                    self._save(phase)
                    self._leave_if_stopped()
                elif copy:
                    self._copy(phase)

    def _batches(self, phase: Phase, first: int) -> Generator[Batch]:
        data = phase.data
        if data is None:
            while True:
                yield {}
        rows = host_rows(data, self.mesh)
        with contextlib.closing(prefetch(data, first, rows=rows)) as source:
            for _, batch in source:
                yield place_batch(batch, self.mesh, data.batch_size)

    def _read(self, phase: Phase, window: _Window, step: int, metrics: Metrics) -> None:
        """Wait for the metrics of a step, watch for bad ones, log when a window is full."""
        window.add(step, jax.device_get(metrics))
        bad = window.last.get("nonfinite")
        self.bad_steps = self.bad_steps + 1 if bad is not None and bad.value() > 0 else 0
        if self.bad_steps >= self.options.max_bad_steps:
            self._log(phase, window)
            self._save(phase)
            raise NonFiniteError(
                f"{self.bad_steps} steps in a row up to step {step} had a loss or gradient that "
                "is not finite; lower optim.learning_rate, set optim.clip, or check the data"
            )
        if step % self.options.log_every == 0:
            self._log(phase, window)

    def _log(self, phase: Phase, window: _Window) -> None:
        if self.checkpoints:
            self.checkpoints.check()
        if window.count:
            row = {"step": window.step, "phase": phase.name, **window.close()}
            for sink in self.sinks:
                sink.write(row)
            self.goodput.write(self.step)

    def _due(self) -> list[Evaluator]:
        every = [e for e in self.recipe.evaluators if isinstance(e.every, int)]
        return [e for e in every if self.step % int(e.every) == 0]

    def _evaluate(self, phase: Phase, evaluators: list[Evaluator]) -> None:
        if evaluators:
            with self.goodput.spent("evaluation"):
                self._measure(phase, evaluators)

    def _measure(self, phase: Phase, evaluators: list[Evaluator]) -> None:
        alive = functools.partial(self.doing, f"evaluating step {self.step}")
        alive()
        context = EvalContext(self.mesh, phase.name, self.workdir, alive)
        state = jax.block_until_ready(averaged(phase.update, self.state))
        row: dict[str, Any] = {"step": self.step, "phase": phase.name}
        for evaluator in evaluators:
            row |= {f"{evaluator.name}/{k}": v for k, v in evaluator(state, context).items()}
        self.status("  ".join(f"{k} {v:.4g}" for k, v in row.items() if isinstance(v, float)))
        for sink in self.sinks:
            if sink is not self.progress:
                sink.write(row)

    def _save_due(self) -> bool:
        every, minutes = self.options.checkpoint_every, self.options.checkpoint_minutes
        by_time = time.monotonic() - self.saved_at > 60 * minutes
        if several():  # their clocks differ
            by_time = self.step % self.options.log_every == 0 and first_says(by_time)
        return by_time or (every > 0 and self.step % every == 0)

    def _told_to_stop(self) -> bool:
        told = told_to_stop(self.step) or self.stop.is_set()
        return told or self.step == self.options.stop_after

    def _leave_if_stopped(self) -> None:
        if self.stopping:
            kept = "run again to continue" if self.checkpoints else "nothing was saved: no workdir"
            raise Interrupted(f"stopped at step {self.step}; {kept}")

    def _page(self, phase: Phase) -> dict[str, Any]:
        if self.rows:
            self.rows.sync()
        return {"phase": phase.name, "config": dict(self.recipe.config)}

    def _copy(self, phase: Phase) -> None:
        self.doing(f"copying step {self.step}")
        if self.local:
            with self.goodput.spent("save"):
                self.local.save(self.step, flatten(self.state), self._page(phase))

    def _save(self, phase: Phase) -> None:
        if self.checkpoints is None:
            return
        self.doing(f"saving step {self.step}")
        with self.goodput.spent("save"):
            self.checkpoints.save(self.step, self.state, self._page(phase))
        self.goodput.write(self.step)
        self.saved_at = time.monotonic()


class _Window:
    """Metrics of the steps since the last log row, merged, with their speed."""

    def __init__(self) -> None:
        self.step, self.count = 0, 0
        self.last: Metrics = {}  # of the newest step alone
        self._merged: Metrics = {}
        self._since = time.monotonic()

    def add(self, step: int, metrics: Metrics) -> None:
        self.step, self.last, self.count = step, metrics, self.count + 1
        self._merged = merge(self._merged, metrics)

    def close(self) -> dict[str, float]:
        """The row of this window; a new one begins."""
        seconds = max(time.monotonic() - self._since, 1e-9)
        row = {name: float(metric.value()) for name, metric in self._merged.items()}
        weight = float(getattr(self._merged.get("loss"), "weight", self.count))
        row |= {"steps_per_second": self.count / seconds, "items_per_second": weight / seconds}
        self._merged, self.count, self._since = {}, 0, time.monotonic()
        return row
