"""What share of a run's time went into steps that count, and where the rest went."""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxformer.observe.goodput import FILE
from jaxformer.observe.metrics import read_jsonl


@dataclasses.dataclass(frozen=True)
class Goodput:
    """Seconds from the first start of a run to its last sign of life."""

    wall: float
    productive: float  # in steps that were not taken again
    lost: Mapping[str, float]  # by reason; all three add up
    starts: int

    @property
    def share(self) -> float:
        return self.productive / self.wall if self.wall else 0.0

    def __str__(self) -> str:
        parts = [f"{name} {_share(s, self.wall)}" for name, s in self.lost.items()]
        starts = f" in {self.starts} starts" if self.starts > 1 else ""
        return f"{_share(self.productive, self.wall)} of {self.wall:.1f} s{starts}" + (
            f"; the rest: {', '.join(parts)}" if parts else ""
        )


def _share(seconds: float, wall: float) -> str:
    return f"{100 * seconds / max(wall, 1e-9):.1f} %"


def goodput(workdir: str | Path) -> Goodput | None:
    """The account of a run over all its starts; None where it kept none.

    "restarts" is the time from the last sign of a start to the next start: what was not written
    down before a kill, the wait, and the start of Python. "repeated steps" is the time in steps
    that a later start took again, because their checkpoint was older or damaged.
    """
    starts: dict[float, list[dict[str, Any]]] = {}
    for row in read_jsonl(Path(workdir) / FILE):
        starts.setdefault(row["start"], []).append(row)
    if not starts:
        return None
    runs = [starts[start] for start in sorted(starts)]
    lost: collections.Counter[str] = collections.Counter()
    productive, resumed_at = 0.0, float("inf")
    for rows in reversed(runs):
        seconds = collections.Counter(rows[-1]["seconds"])
        steps = seconds.pop("steps", 0.0)
        kept = min(_until(rows, resumed_at), steps)
        productive += kept
        lost += collections.Counter({**seconds, "repeated steps": steps - kept})
        resumed_at = min(resumed_at, rows[0]["step"])
    for before, after in itertools.pairwise(runs):
        lost["restarts"] += max(after[0]["start"] - before[-1]["time"], 0.0)
    lost = +lost  # reasons that took no time are left out
    wall = productive + sum(lost.values())
    return Goodput(wall, productive, dict(lost.most_common()), len(runs))


def _until(rows: Sequence[Mapping[str, Any]], step: float) -> float:
    """Seconds of steps that a start had taken at `step`, by proportion between two rows."""
    before = rows[0]
    for row in rows:
        if row["step"] > step:
            done = before["seconds"].get("steps", 0.0)
            way = max(step - before["step"], 0) / max(row["step"] - before["step"], 1)
            return done + way * (row["seconds"].get("steps", 0.0) - done)
        before = row
    return before["seconds"].get("steps", 0.0)
