"""Times of several programs, taken in turns in one process.

Turns make ratios survive a machine whose clocks wander; the median forgets a slow spell. Programs
that cannot be built or run give the first line of their error instead of a time.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

ENOUGH = 5e-3  # seconds of one sample: shorter programs run several times, or dispatch is measured


class Run(NamedTuple):
    """A program ready to run: `start` may return before its work is done, `wait` does not.

    `temporary` is the memory in bytes that it needs besides inputs and outputs, where known.
    """

    start: Callable[[], Any]
    wait: Callable[[Any], Any]
    temporary: int | None = None


class Timing(NamedTuple):
    """Seconds per run, or why there are none."""

    seconds: float | None
    samples: int
    error: str = ""
    temporary: int | None = None


@dataclasses.dataclass(frozen=True)
class Deadline:
    """When to stop, and how often to measure until then."""

    ends: float
    repeats: int = 20

    @classmethod
    def after(cls, seconds: float, repeats: int = 20) -> Deadline:
        return cls(time.monotonic() + seconds, repeats)

    @property
    def passed(self) -> bool:
        return time.monotonic() > self.ends


def program(function: Callable[..., Any], *arrays: Any) -> Run:
    """A compiled function of arrays that are already on the device."""
    compiled = jax.jit(function).lower(*arrays).compile()
    analysis = compiled.memory_analysis()  # None on some back ends
    temporary = None if analysis is None else analysis.temp_size_in_bytes
    return Run(lambda: compiled(*arrays), jax.block_until_ready, temporary)


def race(builds: Mapping[str, Callable[[], Run]], deadline: Deadline) -> dict[str, Timing]:
    """Build each program, then let them take turns; the median of `deadline.repeats` rounds."""
    runs: dict[str, tuple[Run, int]] = {}
    failed: dict[str, Timing] = {}
    for who, build in builds.items():
        try:
            run = build()
            run.wait(run.start())  # to warm up
            runs[who] = run, math.ceil(ENOUGH / max(_sample(run, 1), ENOUGH / 100))
        except Exception as error:  # whatever a compiler or an allocator raises is a result here
            failed[who] = Timing(None, 0, first_line(error))
    samples: dict[str, list[float]] = {who: [] for who in runs}
    for turn in range(deadline.repeats):
        if turn and deadline.passed:
            break
        for who, (run, count) in list(runs.items()):
            try:
                samples[who].append(_sample(run, count))
            except Exception as error:
                failed[who] = Timing(None, 0, first_line(error))
                del runs[who]
    done = {
        who: Timing(statistics.median(samples[who]), len(samples[who]), temporary=run.temporary)
        for who, (run, _) in runs.items()
    }
    return {who: done.get(who) or failed[who] for who in builds}


def _sample(run: Run, count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
        result = run.start()
    run.wait(result)
    return (time.perf_counter() - start) / count


def first_line(error: BaseException) -> str:
    """What an error says, in one line with its type."""
    lines: Sequence[str] = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200] if lines else ''}"
