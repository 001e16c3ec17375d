"""Faults other than kill -9, each with what must come of it. Every function returns a line."""

from __future__ import annotations

import contextlib
import random
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

from jaxformer.errors import STOPPED
from jaxformer.parallel import loopback
from jaxformer.soak.kills import ending
from jaxformer.soak.trainees import (
    SAVE_EVERY,
    Trainees,
    Trial,
    Violation,
    results,
    saved,
)

Fault = Callable[[Trial, Path], str]  # (what is hit, a folder of its own)


def expect(codes: list[int], *wanted: int) -> None:
    if codes != list(wanted):
        raise Violation(f"exit codes {codes} instead of {list(wanted)}")


def sigterm(trial: Trial, folder: Path) -> str:
    """One of two processes is told to stop: both save at one step and leave."""
    with trial.start(folder / "run") as run:
        run.until("a checkpoint", lambda: saved(folder / "run"))
        run.processes[1].send_signal(signal.SIGTERM)
        expect(run.end(), STOPPED, STOPPED)
        lines = [run.line("stopped at step", process=i) for i in range(2)]
    step = saved(folder / "run")[-1]
    if any(f"stopped at step {step};" not in line for line in lines):
        raise Violation(f"the newest checkpoint is {step}; they said {lines}")
    trial.finish(folder / "run")
    trial.check_equal(folder / "run")
    return f"both: {lines[0]} (exit code {STOPPED}); the end is bitwise equal"


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Callable[[str], object]]:
    """A tmpfs mounted at `folder`; gives a function that resizes it. Needs root."""
    folder.mkdir(parents=True)

    def mount(options: str) -> None:
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], check=True)

    mount(f"size={size}")
    try:
        yield lambda size: mount(f"remount,size={size}")
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def full_disk(trial: Trial, folder: Path) -> str:
    """The disk of the run fills up; once there is space the run continues."""
    with small_disk(folder / "disk", "900k") as resize:
        workdir = folder / "disk" / "run"
        with trial.start(workdir) as run:
            codes = run.end()
            line = run.line("jaxformer:", process=codes.index(1) if 1 in codes else None)
        if 1 not in codes or not ("disk is full" in line or "No space left" in line):
            raise Violation(f"exit codes {codes}; {line}")
        before = saved(workdir)
        if not before:
            raise Violation("the disk was too small for a single checkpoint")
        resize("64m")
        begun = trial.finish(workdir)
        if f"continue at step {before[-1]} " not in begun:
            raise Violation(f"checkpoint {before[-1]} was finished; {begun}")
        trial.check_equal(workdir)
    return f"{_without(folder, line)} Then {begun}, bitwise equal"


def _without(folder: Path, line: str) -> str:
    return line.replace(f"{folder}/", "")


def damaged(how: str) -> Fault:
    """A fault: the newest checkpoint is damaged between two starts."""

    def fault(trial: Trial, folder: Path) -> str:
        workdir = folder / "run"
        with trial.start(workdir, f"--stop-after={3 * SAVE_EVERY}") as run:
            expect(run.end(), STOPPED, STOPPED)
        newest, older = saved(workdir)[-1], saved(workdir)[-2]
        files = [p for p in (workdir / "checkpoints" / str(newest)).rglob("d/*") if p.is_file()]
        damage(how, max(files, key=lambda path: path.stat().st_size))
        with trial.start(workdir) as run:
            codes = run.end()
            line = run.line("is damaged and skipped", "/")  # of the process that found it
            begun = run.line("continue at step")
        expect(codes, 0, 0)
        if f"continue at step {older} " not in begun:
            raise Violation(f"checkpoint {older} is whole; {begun}")
        trial.check_equal(workdir)
        return f"{_without(folder, line)}. {begun}, bitwise equal"

    return fault


def damage(how: str, file: Path) -> None:
    """Make a file "missing", "truncated" to its half, or "flipped" in one bit."""
    if how == "missing":
        file.unlink()
        return
    data = bytearray(file.read_bytes())
    if how == "truncated":
        del data[len(data) // 2 :]
    else:
        draw = random.Random(len(data))
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    file.write_bytes(data)


def other_processes(trial: Trial, folder: Path) -> str:
    """Two processes, then one, then four, then two: the same global batches all the way."""
    workdir = folder / "run"
    for processes, stop in ((2, 10), (1, 20), (4, 30)):
        with trial.start(workdir, f"--stop-after={stop}", processes=processes) as run:
            expect(run.end(), *[STOPPED] * processes)
    trial.finish(workdir)
    ours, theirs = results(workdir), results(trial.whole)
    worst = max(
        abs(row["loss"] - theirs[name]["loss"]) / theirs[name]["loss"]
        for name, row in ours.items()
        if "loss" in row
    )
    if ours.keys() != theirs.keys() or worst > 1e-5:  # sums over 1, 2, 4 devices differ in order
        raise Violation(f"losses differ by {worst:.1e}")
    return f"2 -> 1 -> 4 -> 2 processes: all {trial.steps} losses within {worst:.1e} (relative)"


def customised(folder: Path, code: str) -> dict[str, str]:
    """The environment of a process whose Python runs `code` first."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(code)
    return {"PYTHONPATH": str(folder)}


def stalled_data(trial: Trial, folder: Path) -> str:
    """The text of one process is on a disk that never answers: its reader waits for ever."""
    workdir, stuck = folder / "run", folder / "stuck.txt"
    shutil.copy(trial.text, stuck)
    where = loopback.places(2)
    where[1] |= customised(
        folder / "python",
        "import io, threading\n"
        "def never(path, *more, real=io.open, **options):\n"
        f"    if str(path) == {str(stuck)!r}: threading.Event().wait()\n"
        "    return real(path, *more, **options)\n"
        "io.open = never\n",
    )
    hang = "--config.fit.hang_minutes=0.3"
    commands = [
        trial.command(workdir, hang, *more) for more in ((), (f"--config.data.text={stuck}",))
    ]
    with Trainees(commands, where, workdir) as run:
        codes = run.end(seconds=90)
        line = run.line("stands still", "reading the batch of step 1", process=1)
        other = ending(run, 0, codes[0])
    expect(codes[1:], STOPPED)
    trial.finish(workdir)
    trial.check_equal(workdir)
    return f"{line} The other: {other}. Started again with its text: bitwise equal"


def hung_peer(trial: Trial, folder: Path) -> str:
    """A process is frozen (SIGSTOP): alive, connected, and silent."""
    workdir = folder / "run"
    with trial.start(workdir, "--config.fit.hang_minutes=0.3") as run:
        run.until("a checkpoint", lambda: saved(workdir))
        run.processes[1].send_signal(signal.SIGSTOP)
        run.until("the end of the other", lambda: run.processes[0].poll() is not None, 60)
        run.processes[1].kill()
        codes = run.end()
        line = run.line("stands still", process=0)
    expect(codes, STOPPED, -signal.SIGKILL)
    trial.finish(workdir)
    trial.check_equal(workdir)
    return f"{line} Started again: bitwise equal"


def port_conflict(trial: Trial, folder: Path) -> str:
    """Another program has the port at which the processes are to meet."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        where = loopback.places(2, port=taken.getsockname()[1])
        commands = [trial.command(folder / "run")] * 2
        with Trainees(commands, where, folder / "run") as run:
            run.until("the end of the first", lambda: run.processes[0].poll() is not None, 60)
            expect([run.processes[0].returncode], STOPPED)
            run.until("its words", lambda: any("jaxformer:" in x for x in run.output[0]), 5)
            return run.line("jaxformer:", "port", process=0)


def clocks(trial: Trial, folder: Path) -> str:
    """The clock of one process is a day ahead, while checkpoints are due by the minute."""
    where = loopback.places(2)
    where[1] |= customised(
        folder / "python",
        "import time\n"
        "for name in ('time', 'monotonic'):\n"
        "    setattr(time, name, lambda real=getattr(time, name): real() + 86_400)\n",
    )
    often = "--config.fit.checkpoint_minutes=0.02"
    commands = [trial.command(folder / "run", often)] * 2
    with Trainees(commands, where, folder / "run") as run:
        expect(run.end(), 0, 0)
    trial.check_equal(folder / "run")
    count = len(saved(folder / "run"))
    if count <= trial.steps // SAVE_EVERY:
        raise Violation(f"{count} checkpoints: none was written by the clock")
    return f"one clock a day ahead: no effect; {count} checkpoints, bitwise equal"


FAULTS: dict[str, Fault] = {
    "sigterm": sigterm,
    "full_disk": full_disk,
    "truncated_file": damaged("truncated"),
    "flipped_bit": damaged("flipped"),
    "missing_file": damaged("missing"),
    "other_processes": other_processes,
    "stalled_data": stalled_data,
    "hung_peer": hung_peer,
    "port_conflict": port_conflict,
    "clocks": clocks,
}


def inject(name: str, trial: Trial) -> str:
    """Run one fault in a folder of its own; the line that says what came of it."""
    mine = trial.folder / name
    shutil.rmtree(mine, ignore_errors=True)
    mine.mkdir(parents=True)
    return FAULTS[name](trial, mine)
