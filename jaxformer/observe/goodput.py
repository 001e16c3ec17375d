"""Where the time of a run goes, kept in its own file over all its starts."""

from __future__ import annotations

import collections
import contextlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from jaxformer.observe.metrics import Jsonl

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
