"""Several processes of one run on this machine: what a pod does, with nothing but a laptop."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import IO

from jaxformer.errors import STOPPED

GRACE = 20.0  # seconds for the others to leave by themselves once one has


def run(command: Sequence[str], processes: int, devices: int = 1, restarts: int = 0) -> int:
    """Run `jaxformer COMMAND` as so many processes; the worst of their exit codes.

    Where one stops or dies the others are ended, and all start again up to `restarts` times:
    what the launchers of a cluster do.
    """
    for attempt in range(restarts + 1):
        code = _once(command, processes, devices)
        again = code < 0 or code == STOPPED  # killed, or asks for it
        if not again or attempt == restarts:
            break
        print(f"multihost: exit code {code}; start {attempt + 2}", file=sys.stderr, flush=True)
    return code if code >= 0 else 128 - code


def _once(command: Sequence[str], processes: int, devices: int) -> int:
    where = places(processes, devices)
    running = [start(command, place) for place in where]
    printers = [
        threading.Thread(target=_prefix, args=(i, process.stdout), daemon=True)
        for i, process in enumerate(running)
    ]
    for printer in printers:
        printer.start()
    try:
        while all(code is None or code == 0 for code in (p.poll() for p in running)):
            if all(p.poll() == 0 for p in running):
                break
            time.sleep(0.05)
        first = next((p.returncode for p in running if p.poll()), 0)
        deadline = time.monotonic() + GRACE
        while any(p.poll() is None for p in running) and time.monotonic() < deadline:
            time.sleep(0.05)
    finally:
        for process in running:
            if process.poll() is None:
                process.kill()
            process.wait()
    for printer in printers:
        printer.join(timeout=1)
    return first


def places(processes: int, devices: int = 1, port: int | None = None) -> list[dict[str, str]]:
    """The environment of each process: where they meet, on a free port, and which one it is."""
    address = f"127.0.0.1:{port or free_port()}"
    return [
        {
            "JAX_COORDINATOR_ADDRESS": address,
            "JAX_NUM_PROCESSES": str(processes),
            "JAX_PROCESS_ID": str(index),
            "JAX_NUM_CPU_DEVICES": str(devices),
            "JAX_PLATFORMS": "cpu",
        }
        for index in range(processes)
    ]


def start(command: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen[str]:
    """`jaxformer COMMAND` with `environment` over this one's, its output in one pipe."""
    return subprocess.Popen(
        [sys.executable, "-m", "jaxformer", *command],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _prefix(index: int, lines: IO[str] | None) -> None:
    for line in lines or ():
        print(f"[{index}] {line}", end="", file=sys.stderr, flush=True)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
