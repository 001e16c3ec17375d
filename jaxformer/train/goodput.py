"""Where the time of a run goes, kept in its own file over all its starts, and traces of steps."""

from __future__ import annotations

import collections
import contextlib
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from jaxformer.recipe import ConfigError
from jaxformer.train.metrics import Jsonl

FILE = "goodput.jsonl"


class Goodput:
    """Books every second since the start under one reason, the steps themselves under "steps".

    Rows of `<workdir>/goodput.jsonl`: "start" and "time" (s, Unix), "step", and "seconds" by reason
    since that start. They are written at the start, with every log row and save, and at the end, so
    that what a kill cost can be told by its gap. `jaxformer.evaluation.goodput` reads them.
    """

    def __init__(self, workdir: Path | None) -> None:
        self.start = time.time()
        self.seconds: collections.defaultdict[str, float] = collections.defaultdict(float)
        self.step_seconds = float("inf")  # that one step takes alone, the shortest seen
        self._reason, self._since = "start", time.monotonic()
        self._rows = Jsonl(workdir / FILE, resume_at=sys.maxsize) if workdir else None

    def book(self, reason: str) -> str:
        """Book what follows under `reason`; the one before."""
        now, before = time.monotonic(), self._reason
        self.seconds[before] += now - self._since
        self._reason, self._since = reason, now
        return before

    @contextlib.contextmanager
    def spent(self, reason: str) -> Iterator[None]:
        """Book the block under `reason`, but for what it books itself."""
        before = self.book(reason)
        try:
            yield
        finally:
            self.book(before)

    @contextlib.contextmanager
    def waiting_for_data(self, dispatched: float) -> Iterator[None]:
        """Book the block under "data", but for the time in which the last step still ran."""
        began = time.monotonic()
        with self.spent("data"):
            yield
        worked = min(dispatched + self.step_seconds, time.monotonic()) - began
        self.seconds["data"] -= max(worked, 0.0)
        self.seconds["steps"] += max(worked, 0.0)

    def finished(self, dispatched: float) -> None:
        """The last step is done, and nothing is in flight behind it."""
        self.step_seconds = min(self.step_seconds, time.monotonic() - dispatched)

    def write(self, step: int) -> None:
        self.book(self._reason)
        if self._rows is not None:
            row = {"start": self.start, "time": time.time(), "step": step}
            self._rows.write({**row, "seconds": {k: round(v, 4) for k, v in self.seconds.items()}})

    def close(self, step: int) -> None:
        self.write(step)
        if self._rows is not None:
            self._rows.close()


class Trace:
    """An xprof trace of steps `first` to `last` alone, under `<workdir>/profile`.

    Of several processes the first one writes it: all run the same program.
    """

    def __init__(
        self, steps: tuple[int, int] | None, workdir: Path | None, say: Callable[[str], None]
    ) -> None:
        if steps is not None and workdir is None:
            raise ConfigError("profile: needs a workdir to write the trace to")
        self._steps = steps if steps and jax.process_index() == 0 else (1, 0)
        self._say, self._open = say, False
        self.folder = Path(workdir or ".") / "profile"

    def step(self, number: int, state: Any) -> contextlib.AbstractContextManager[Any]:
        """A context for the call of a step, whose input is `state`."""
        wanted = self._steps[0] <= number <= self._steps[1]
        if wanted != self._open:
            jax.block_until_ready(state)  # no step before or after it is in the trace
            self._start() if wanted else self.close()
        if not wanted:
            return contextlib.nullcontext()
        return jax.profiler.StepTraceAnnotation("step", step_num=number)

    def _start(self) -> None:
        jax.profiler.start_trace(self.folder)
        self._open = True

    def close(self) -> None:
        """End the trace, where one is under way; everything in flight must be done."""
        if self._open:
            self._open = False
            jax.profiler.stop_trace()
            first, last = self._steps
            self._say(f"profile of steps {first} to {last}: {self.folder} (open it with xprof)")


def traced_steps(text: str) -> tuple[int, int]:
    """(10, 15) of "steps=10..15" or "10..15", both ends included.

    Raises:
        ConfigError: not of that form.
    """
    found = re.fullmatch(r"(?:steps=)?(\d+)\.\.(\d+)", text)
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        raise ConfigError(f"profile: {text!r} is not like steps=10..15 (first..last, from 1)")
    return int(found[1]), int(found[2])
