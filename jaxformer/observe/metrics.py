"""Where metrics go: a JSONL file always, a progress bar, TensorBoard when asked."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Mapping
from typing import IO, Any, Protocol

from etils import epath

from jaxformer.storage.places import AnyPath, remote


class Sink(Protocol):
    """Takes one row of named numbers per call."""

    def write(self, row: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


def read_jsonl(path: AnyPath) -> list[dict[str, Any]]:
    """The rows of a metrics file; a last line cut short by a kill is left out."""
    rows = []
    file = epath.Path(path)
    for line in file.read_text().splitlines() if file.exists() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


class Jsonl:
    """Appends rows to a file, one JSON object a line, flushed."""

    def __init__(self, path: AnyPath, *, resume_at: int = 0) -> None:
        """Rows beyond step `resume_at` are dropped: the resumed run writes them again."""
        self.path = epath.Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept = [row for row in read_jsonl(self.path) if row["step"] <= resume_at]
        self._text = "".join(json.dumps(row) + "\n" for row in kept)
        self._file: IO[str] | None = None
        if remote(self.path):
            return
        beside = self.path.with_suffix(".partial")  # a kill here must not lose the file
        beside.write_text(self._text)
        beside.replace(self.path)
        self._file = self.path.open("a")

    def write(self, row: Mapping[str, Any]) -> None:
        # JSON has no NaN: a number that is not finite is written as null.
        clean = {
            k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()
        }
        line = json.dumps(clean) + "\n"
        if self._file is None:
            self._text += line
        else:
            self._file.write(line)
            self._file.flush()

    def sync(self) -> None:
        """Bring all rows to where they are kept: object stores cannot append to a file.

        Rows that come after the newest checkpoint are written again by the run that continues.
        """
        if self._file is None:
            self.path.write_text(self._text)

    def close(self) -> None:
        self.sync()
        if self._file is not None:
            self._file.close()


class TensorBoard:
    """Scalars for TensorBoard, through tensorboardX."""

    def __init__(self, directory: AnyPath) -> None:
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(directory))

    def write(self, row: Mapping[str, Any]) -> None:
        for name, value in row.items():
            if name != "step" and isinstance(value, int | float):
                self._writer.add_scalar(name, value, row["step"])

    def close(self) -> None:
        self._writer.close()


class Progress:
    """A bar with loss, speed and time left on a terminal; a line every 10 s elsewhere."""

    def __init__(self, total: int, done: int, unit: str) -> None:
        self._unit, self._total, self._first = unit, total, done
        self._started = self._printed = time.monotonic()
        self._bar: Any = None
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
            )
            self._bar = Bar(*columns, console=Console(stderr=True))
            self._task = self._bar.add_task("", total=total, completed=done)
            self._bar.start()

    def status(self, text: str) -> None:
        """A line that says what the run is doing, so that a hung one shows where."""
        (self._bar.console.print if self._bar else _stderr)(text)

    def write(self, row: Mapping[str, Any]) -> None:
        text = f"{row['phase']}  loss {row.get('loss', math.nan):.4f}"
        if "steps_per_second" in row:
            text += f"  {row['steps_per_second']:.3g} steps/s"
            text += f"  {row['items_per_second']:.3g} {self._unit}/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=row["step"], description=text)
            return
        now = time.monotonic()
        if now - self._printed > 10 or row["step"] >= self._total:
            speed = (row["step"] - self._first) / max(now - self._started, 1e-9)
            left = (self._total - row["step"]) / max(speed, 1e-9)
            _stderr(f"step {row['step']}/{self._total}  {text}  {left:.0f} s left")
            self._printed = now

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


def _stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
