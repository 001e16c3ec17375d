"""One stage of a measurement: its rows, kept on disk from the first on, and its time limit."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jaxformer.bench.clock import Deadline, Timing
from jaxformer.bench.machine import describe


class Stage:
    """Collects rows and writes DIR/<name>.json after each, so that a kill loses one row at most."""

    def __init__(self, name: str, out: Path, deadline: Deadline, *, tiny: bool = False) -> None:
        self.name, self.out, self.deadline, self.tiny = name, out, deadline, tiny
        self.machine = describe()
        self.rows: list[dict[str, Any]] = []
        self.left_out: list[dict[str, Any]] = []
        self.save()

    def leaves_out(self, case: Mapping[str, Any]) -> bool:
        """Whether there is no time for a case any more; it is noted."""
        if self.deadline.passed:
            self.left_out.append(dict(case))
            self.save()
        return self.deadline.passed

    def add(
        self, case: Mapping[str, Any], timing: Timing | None = None, flops: float = 0, **more: Any
    ) -> None:
        """A row: the case, its time and rate, and whatever else was found."""
        row = dict(case)
        if timing is not None and timing.seconds is not None:
            row |= {"ms": timing.seconds * 1e3, "samples": timing.samples}
            if flops:
                row["TFLOP/s"] = flops / timing.seconds / 1e12
            if timing.temporary is not None:
                row["temporary MiB"] = timing.temporary / 2**20
        elif timing is not None:
            row["error"] = timing.error
        self.rows.append(row | more)
        print(json.dumps(_clean(self.rows[-1])), flush=True)
        self.save()

    def add_race(
        self,
        case: Mapping[str, Any],
        timings: Mapping[str, Timing],
        *,
        against: str,
        work: Callable[[str], float] = lambda who: 0.0,
        **more: Any,
    ) -> None:
        """A row per contender, with its speed over that of the contender `against`.

        work: its FLOPs, where they are the same kind of work: speed is then FLOP/s. A prefix such
        as "plain" stands for the contender of the same implementation, "plain triton".
        """
        for who, timing in timings.items():
            names = [against, f"{against} {who.partition(' ')[2]}"]
            other = next((x for x in names if x in timings), "")
            theirs = timings[other].seconds if other else None
            ratio = {}
            if timing.seconds and theirs and who != other:
                times = theirs / timing.seconds
                ratio[f"speed / {against}"] = times * (work(who) or 1.0) / (work(other) or 1.0)
            self.add(case | {"who": who}, timing, work(who), **ratio, **more)

    def save(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        found = {
            "stage": self.name,
            "tiny": self.tiny,
            **self.machine,
            "rows": [_clean(row) for row in self.rows],
            "left_out": self.left_out,
        }
        beside = self.out / f"{self.name}.partial"
        beside.write_text(json.dumps(found, indent=1) + "\n")
        beside.replace(self.out / f"{self.name}.json")


def _clean(row: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has no NaN: a number that is not finite is written as null."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
