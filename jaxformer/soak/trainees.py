"""A small run as real processes on this machine, watched from outside through its files."""

from __future__ import annotations

import dataclasses
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxformer.observe.metrics import read_jsonl
from jaxformer.parallel import loopback

SAVE_EVERY, EVALUATE_EVERY = 10, 25  # steps
LIMIT = 120.0  # seconds for whatever is waited for


class Violation(AssertionError):
    """Something that a fault must never do."""


@dataclasses.dataclass(frozen=True)
class Trial:
    """What is hit: a run of so many steps, and the uninterrupted one that it must equal."""

    folder: Path
    steps: int = 200

    @property
    def text(self) -> Path:
        return self.folder / "text.txt"

    @property
    def whole(self) -> Path:
        return self.folder / "whole"

    def prepare(self) -> None:
        """Write the text, which is this package's own source, and do the uninterrupted run."""
        files = sorted(Path(__file__).parent.parent.glob("train/*.py"))
        self.text.write_text("".join(file.read_text() for file in files))
        self.finish(self.whole)

    def command(self, workdir: Path, *more: str) -> list[str]:
        """`train` of a decoder so small that most of its time is the start of Python."""
        sizes = {"width": 16, "depth": 1, "heads": 2, "kv_heads": 1, "hidden": 32}
        fields = {f"model.{name}": size for name, size in sizes.items()} | {
            "steps": self.steps,
            "data.text": self.text,
            "data.length": 32,
            "evaluate.every": EVALUATE_EVERY,
            "fit.log_every": 1,
            "fit.checkpoint_every": SAVE_EVERY,
            "fit.keep": 1000,
        }
        set_fields = [f"--config.{name}={value}" for name, value in fields.items()]
        return ["train", "--config=decoder:tiny", f"--workdir={workdir}", *set_fields, *more]

    def start(self, workdir: Path, *more: str, processes: int = 2) -> Trainees:
        """All processes of a run, or of its continuation."""
        commands = [self.command(workdir, *more)] * processes
        return Trainees(commands, loopback.places(processes), workdir)

    def finish(self, workdir: Path, *more: str) -> str:
        """Run to the end; the line that says where it began.

        Raises:
            Violation: it failed.
        """
        with self.start(workdir, *more) as run:
            codes = run.end()
            if any(codes):
                said = " | ".join(line for lines in run.output for line in lines[-3:])
                raise Violation(f"exit codes {codes} instead of 0: {said[-1500:]}")
            return run.line("at step", f"of {self.steps}")

    def check_equal(self, workdir: Path) -> None:
        """Numbers and final arrays of a run equal those of the whole one, to the last bit.

        Raises:
            Violation: they do not.
        """
        ours, theirs = results(workdir), results(self.whole)
        if ours != theirs:
            differ = [name for name in theirs if ours.get(name) != theirs[name]]
            raise Violation(f"metrics differ from the uninterrupted run, first at {differ[:1]}")
        mine, other = arrays(workdir), arrays(self.whole)
        if mine.keys() != other.keys() or any(mine[k] != other[k] for k in mine):
            raise Violation("final arrays differ from those of the uninterrupted run")


class Trainees:
    """The processes of one start of a run. As a context manager it leaves none behind."""

    def __init__(
        self,
        commands: Sequence[Sequence[str]],
        places: Sequence[Mapping[str, str]],
        workdir: Path,
    ) -> None:
        self.workdir = workdir
        self.processes = [
            loopback.start(c, place) for c, place in zip(commands, places, strict=True)
        ]
        self.output: list[list[str]] = [[] for _ in self.processes]
        self._readers = [
            threading.Thread(target=self._read, args=(p, lines), daemon=True)
            for p, lines in zip(self.processes, self.output, strict=True)
        ]
        for reader in self._readers:
            reader.start()

    @staticmethod
    def _read(process: subprocess.Popen[str], lines: list[str]) -> None:
        assert process.stdout is not None
        lines.extend(line.rstrip() for line in process.stdout)

    def __enter__(self) -> Trainees:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(signal.SIGCONT)
                process.kill()
            process.wait()

    def until(self, what: str, holds: Callable[[], Any], seconds: float = LIMIT) -> Any:
        """Wait for something to hold, and return what it gave.

        Raises:
            Violation: it did not come, or all processes ended first.
        """
        deadline = time.monotonic() + seconds
        while not (found := holds()):
            if time.monotonic() > deadline or all(p.poll() is not None for p in self.processes):
                said = " | ".join(lines[-1] for lines in self.output if lines)
                raise Violation(f"{what}: did not come; last words: {said}")
            time.sleep(0.002)
        return found

    def end(self, seconds: float = LIMIT) -> list[int]:
        """Wait until all have ended; their exit codes.

        Raises:
            Violation: one of them hangs.
        """
        deadline = time.monotonic() + seconds
        for index, process in enumerate(self.processes):
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                raise Violation(f"process {index} still runs after {seconds:.0f} s") from None
        for reader in self._readers:
            reader.join(timeout=5)
        return [process.returncode for process in self.processes]

    def line(self, *words: str, process: int | None = None) -> str:
        """The last printed line with all of `words` in it.

        Raises:
            Violation: nobody said so.
        """
        some = self.output if process is None else [self.output[process]]
        lines = [line for part in some for line in part if all(word in line for word in words)]
        if not lines:
            said = " | ".join(line for part in self.output for line in part[-3:])
            raise Violation(f"nobody said {' ... '.join(words)!r}; last words: {said[-1500:]}")
        return lines[-1]


def saved(workdir: Path) -> list[int]:
    """The steps of finished checkpoints, oldest first."""
    names = [path.name for path in (workdir / "checkpoints").glob("*")]
    return sorted(int(name) for name in names if name.isdigit())


def writing(workdir: Path) -> bool:
    """Whether a checkpoint is begun and not finished."""
    return any((workdir / "checkpoints").glob("*.orbax-checkpoint-tmp*"))


def rows(workdir: Path) -> list[dict[str, Any]]:
    return read_jsonl(workdir / "metrics.jsonl")


def results(workdir: Path) -> dict[str, Any]:
    """All numbers of a run that must not depend on what happened to it, by step."""
    speed = ("steps_per_second", "items_per_second")
    found: dict[str, Any] = {}
    for row in rows(workdir):
        kind = "loss" if "loss" in row else "evaluation"
        name = f"{row['step']} {kind}"
        if name in found:
            raise Violation(f"metrics.jsonl has two rows for {name}")
        found[name] = {k: v for k, v in row.items() if k not in speed}
    return found


def arrays(workdir: Path) -> dict[str, bytes]:
    """{name: bytes} of the newest checkpoint, read by orbax as plain arrays."""
    import numpy as np
    import orbax.checkpoint as ocp

    from jaxformer import paths

    folder = workdir / "checkpoints" / str(saved(workdir)[-1]) / "state"
    with ocp.PyTreeCheckpointer() as reader:
        shapes = reader.metadata(folder).item_metadata.tree
        how = paths.map_named(lambda *_: ocp.RestoreArgs(restore_type=np.ndarray), shapes)
        tree = reader.restore(folder, restore_args=how)
    return {name: np.asarray(x).tobytes() for name, x in paths.leaves(tree).items()}
