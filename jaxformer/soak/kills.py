"""kill -9 at random moments, again and again, and what must hold after each."""

from __future__ import annotations

import math
import random
import signal
import time
from pathlib import Path
from typing import Any

from jaxformer.errors import STOPPED
from jaxformer.soak.trainees import (
    EVALUATE_EVERY,
    Trainees,
    Trial,
    Violation,
    rows,
    saved,
    writing,
)

KILLS_OF_A_RUN = 12
MOMENTS = ("step", "save", "evaluation", "prefetch")


def strike(draw: random.Random, run: Trainees, moment: str, victim: int) -> dict[str, Any]:
    """Kill one process at a moment of its work; say whether the moment was met."""
    workdir, process = run.workdir, run.processes[victim]
    run.until("the start", lambda: any(" at step " in line for line in run.output[0]))
    before = len(rows(workdir))
    if moment == "prefetch":
        time.sleep(draw.uniform(0.0, 1.5))  # the first batches are read while the step compiles
    elif moment == "step":
        more = draw.randint(1, 30)
        run.until("a step", lambda: len(rows(workdir)) >= before + more)
        time.sleep(draw.uniform(0.0, 0.02))
    elif moment == "save":
        run.until("a save", lambda: writing(workdir) and len(rows(workdir)) > before)
        time.sleep(draw.uniform(0.0, 0.03))
    else:
        run.until("an evaluation", lambda: _evaluates(workdir) and len(rows(workdir)) > before)
        time.sleep(draw.uniform(0.0, 0.01))
    process.kill()
    process.wait()
    now = rows(workdir)
    met = {
        "prefetch": len(now) == before,
        "step": len(now) > before,
        "save": writing(workdir),
        "evaluation": _evaluates(workdir),
    }
    return {"moment": moment, "process": victim, "met": met[moment], "step": _last(workdir)}


def _evaluates(workdir: Path) -> bool:
    """Whether the training row of an evaluated step is there, and its evaluation is not."""
    last = rows(workdir)[-1:]
    return bool(last) and "loss" in last[0] and last[0]["step"] % EVALUATE_EVERY == 0


def _last(workdir: Path) -> int:
    return max((row["step"] for row in rows(workdir)), default=0)


def kill_once(trial: Trial, workdir: Path, draw: random.Random, moment: str) -> dict[str, Any]:
    """Start or continue the run, kill one of its processes, and see the others end.

    Raises:
        Violation: a process hangs, a finished checkpoint is gone, or the run did not begin at the
            newest one.
    """
    before = saved(workdir)
    victim = draw.randrange(2)
    with trial.start(workdir) as run:
        found = strike(draw, run, moment, victim)
        since = time.monotonic()
        codes = run.end(seconds=60)
        seconds = time.monotonic() - since
        said = run.line("at step", f"of {trial.steps}", process=0)
        begun = int(said.split("at step ")[1].split()[0])
    if begun != (before[-1] if before else 0):
        raise Violation(f"checkpoint {before[-1:]} was finished; the run began at {begun}")
    lost = sorted(set(before) - set(saved(workdir)))
    if lost:
        raise Violation(f"finished checkpoints are gone: {lost}")
    others = [ending(run, i, code) for i, code in enumerate(codes) if i != victim]
    return found | {
        "began": begun,
        "newest": saved(workdir)[-1] if saved(workdir) else None,
        "others": others,
        "others_ended_in_s": round(seconds, 2),
    }


def ending(run: Trainees, process: int, code: int) -> str:
    """How a process ended that was not hit: by its own line, or by that of JAX's runtime.

    The runtime aborts a process that is not waiting for a collective (it compiles, or reads) when
    the coordinator dies; its answer can be replaced from Python, but then aborts as well, because
    the status it passes has no Python type (`std::bad_cast`, jaxlib 0.10.2).

    Raises:
        Violation: in another way.
    """
    if code == STOPPED:
        run.line("lost another one", process=process)
        return "own line"
    if code == -signal.SIGABRT:
        run.line("Terminating process", "another task died", process=process)
        return "line of JAX's runtime"
    last = " | ".join(run.output[process][-3:])
    raise Violation(f"process {process} ended with {code} instead of {STOPPED}: {last}")


def kill_round(
    trial: Trial,
    workdir: Path,
    draw: random.Random,
    done: list[dict[str, Any]],
    deadline: float = math.inf,
    kills: int = KILLS_OF_A_RUN,
) -> str:
    """One run, killed so many times or until `deadline`, then finished and compared.

    What came of each kill is added to `done`.
    """
    # A kill may wait for 30 more steps, so the last ones are left for the end.
    while len(done) < kills and time.monotonic() < deadline:
        if saved(workdir) and saved(workdir)[-1] > trial.steps - 40:
            break
        moment = MOMENTS[draw.randrange(len(MOMENTS))]
        done.append(kill_once(trial, workdir, draw, moment))
    begun = trial.finish(workdir)
    trial.check_equal(workdir)
    return f"{len(done)} kills; {begun}; bitwise equal"
