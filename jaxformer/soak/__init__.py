"""`jaxformer soak`: a small run as real processes on this machine, hit by every fault we know.

The uninterrupted run comes first. Then each fault of `faults.py` once, then kill -9 at random
moments until the time is up. Every run that was hit ends with the numbers and arrays of the
uninterrupted one, to the last bit (across other numbers of processes to 1e-5).
"""

from __future__ import annotations

import collections
import datetime
import json
import os
import platform
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from jaxformer.soak.faults import FAULTS, inject
from jaxformer.soak.kills import kill_round
from jaxformer.soak.trainees import Trial, Violation
from jaxformer.train.checkpoint import versions

# Compiled programs are kept, or half the time of a start would go into compiling the same again.
CACHE = {
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
}


def soak(minutes: float, seed: int, output: Path, kills_only: bool = False) -> bool:
    """Add what came of every fault to the sessions in `output`; whether nothing was violated."""
    deadline = time.monotonic() + 60 * minutes
    draw = random.Random(seed)
    before = json.loads(output.read_text())["sessions"] if output.exists() else []
    session: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": {**versions(), "python": platform.python_version()},
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "seed": seed,
        "run": f"{Trial.steps} steps of a decoder on 2 processes with 1 CPU device each",
        "faults": {},
        "violations": [],
        "rounds": [],
    }
    with tempfile.TemporaryDirectory() as name:
        trial = Trial(Path(name))
        os.environ.update({"JAX_COMPILATION_CACHE_DIR": f"{name}/cache", **CACHE})
        trial.prepare()
        for fault in () if kills_only else FAULTS:
            session["faults"][fault] = _outcome(session, fault, inject, fault, trial)
            _write(output, [*before, session])
        while time.monotonic() < deadline:
            number = len(session["rounds"])
            found: list[dict[str, Any]] = []
            workdir = trial.folder / f"round_{number}"
            said = _outcome(
                session, f"round {number}", kill_round, trial, workdir, draw, found, deadline
            )
            session["rounds"].append({"kills": found, "end": said})
            _write(output, [*before, session])
    return not session["violations"]


def _outcome(session: dict[str, Any], name: str, act: Any, *arguments: Any) -> str:
    print(f"soak: {name}", file=sys.stderr, flush=True)
    try:
        said = act(*arguments)
    except Violation as error:
        said = f"VIOLATED: {error}"
        session["violations"].append(f"{name}: {error}")
    print(f"soak: {name}: {said}", file=sys.stderr, flush=True)
    return said


def _write(output: Path, sessions: list[dict[str, Any]]) -> None:
    """The sessions, and in front what they come to."""
    kills = [kill for session in sessions for r in session["rounds"] for kill in r["kills"]]
    moments = collections.Counter(kill["moment"] for kill in kills)
    met = collections.Counter(kill["moment"] for kill in kills if kill["met"])
    summary = {
        "kills": len(kills),
        "violations": sum(len(session["violations"]) for session in sessions),
        "moments": {m: {"drawn": n, "met": met[m]} for m, n in sorted(moments.items())},
        "others ended after, s (longest)": max((k["others_ended_in_s"] for k in kills), default=0),
        "others ended by": dict(collections.Counter(how for k in kills for how in k["others"])),
        "faults": sorted({name for session in sessions for name in session["faults"]}),
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps({"summary": summary, "sessions": sessions}, indent=1) + "\n")
