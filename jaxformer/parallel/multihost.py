"""One program in many processes: how they find each other, and what they agree on.

The engine is JAX's own: `jax.distributed` knows SLURM, Kubernetes and TPU pods. This module says
when to ask it, waits a bounded time, and turns what it raises into one line.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, NoReturn

import jax
import numpy as np
from jax.errors import JaxRuntimeError
from jax.experimental import multihost_utils

from jaxformer.errors import ConfigError

WAIT = 300  # seconds for all processes to appear
PORT_WAIT = 10  # seconds for the port of the first process to become free
HEARTBEAT = 60  # seconds without a sign of life after which a process counts as lost


class Place(NamedTuple):
    """Where the processes of a run meet, how many they are, and which of them this is."""

    coordinator: str
    processes: int
    process: int


class PeersLost(RuntimeError):
    """Another process of this run is gone or never came; start all of them again to continue."""


def start(environment: Mapping[str, str] = os.environ, wait: int = WAIT) -> None:
    """Join the other processes of this job, if its environment speaks of any.

    Asked are JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID (which the launchers
    set; in a Job of Kubernetes, as those of a JobSet, the pod's JOB_COMPLETION_INDEX stands for the
    last), SLURM's step variables, a TPU pod's list of workers, and Kubernetes itself where its
    client is installed (`jax[k8s]`). Before any other use of JAX.

    Raises:
        ConfigError: the three variables are not all there, or not numbers; a Job of several pods
            that nothing tells where they meet.
        PeersLost: not all processes came within `wait` seconds.
    """
    who = _named(environment)
    if who is None and not _cluster(environment):
        return
    if who is not None:
        # The runtime ends the process, without an exception, when nobody answers: ask first.
        print(
            f"process {who.process} of {who.processes}: waiting up to {wait} s for the others "
            f"at {who.coordinator}",
            file=sys.stderr,
            flush=True,
        )
        if who.process:
            _until_somebody_listens(who.coordinator, wait)
        else:
            _until_free(who.coordinator, min(wait, PORT_WAIT))
    try:
        jax.distributed.initialize(
            who.coordinator if who else None,
            who.processes if who else None,
            who.process if who else None,
            initialization_timeout=wait,
            heartbeat_timeout_seconds=HEARTBEAT,
        )
    except (JaxRuntimeError, RuntimeError, OSError) as error:
        where = who.coordinator if who else "the first process"
        raise PeersLost(
            f"not all processes met at {where} within {wait} s ({_first_line(error)}); check that "
            "every process runs, that the address is reachable and that its port is free"
        ) from error


def _named(environment: Mapping[str, str]) -> Place | None:
    """What the three variables say."""
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    given = {name: environment[name] for name in names if environment.get(name)}
    if not given:
        return None
    if environment.get("JOB_COMPLETION_INDEX"):
        given.setdefault(names[2], environment["JOB_COMPLETION_INDEX"])
    missing = [name for name in names if name not in given]
    if missing:
        raise ConfigError(f"{missing[0]}: not set, but {', '.join(given)} is; set all three")
    address, *numbers = (given[name] for name in names)
    for name, value in zip(names[1:], numbers, strict=True):
        if not value.isdigit():
            raise ConfigError(f"{name}: {value!r} is not a number")
    count, index = map(int, numbers)
    if index >= count:
        raise ConfigError(f"JAX_PROCESS_ID: {index}, but there are only {count} processes")
    if ":" not in address:
        raise ConfigError(f"JAX_COORDINATOR_ADDRESS: {address!r} needs host:port")
    return Place(address, count, index)


def _until_free(address: str, wait: float) -> None:
    """Wait for a port that the process before may still hold.

    The runtime, which listens there next, crashes now and then (a segmentation fault, seen with
    jaxlib 0.10.2) where another program does.
    """
    port = int(address.rpartition(":")[2])
    deadline = time.monotonic() + wait
    while True:
        with socket.socket() as found:
            # As the runtime does: connections that are being closed do not count.
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                found.bind(("", port))
                return
            except OSError as error:
                if time.monotonic() > deadline:
                    raise PeersLost(
                        f"another program has the port of {address} ({error.strerror}); check "
                        "that every process runs with an address whose port is free"
                    ) from error
        time.sleep(0.2)


def _until_somebody_listens(address: str, wait: float) -> None:
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + wait
    while True:
        try:
            socket.create_connection((host, int(port)), timeout=1).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise PeersLost(
                    f"nobody listened at {address} within {wait} s ({error}); check that process 0 "
                    "runs, that the address is reachable and that its port is open"
                ) from error
            time.sleep(0.2)


def _cluster(environment: Mapping[str, str]) -> bool:
    """Whether JAX finds several processes by itself here."""
    # salloc without srun has a job but no step: one process, nobody to wait for.
    slurm = environment.get("SLURM_STEP_NODELIST") and environment.get("SLURM_NTASKS", "1") != "1"
    workers = environment.get("TPU_WORKER_HOSTNAMES", "").count(",") > 0
    slices = environment.get("MEGASCALE_NUM_SLICES", "1") != "1"
    if slurm or workers or slices:
        return True
    index = environment.get("JOB_COMPLETION_INDEX")
    if not index or "KUBERNETES_SERVICE_HOST" not in environment:
        return False
    if importlib.util.find_spec("kubernetes") is not None:
        return True
    if index != "0":  # each pod would train alone, into the same folder
        raise ConfigError(
            f"JAX_COORDINATOR_ADDRESS: not set in pod {index} of a Kubernetes Job; set it and "
            "JAX_NUM_PROCESSES in the manifest, or install jax[k8s]"
        )
    return False


def several() -> bool:
    """Whether this run has more than one process."""
    return jax.process_count() > 1


def first_says(yes: bool) -> bool:
    """What the first process says, in all of them. All must ask at the same step."""
    return bool(multihost_utils.broadcast_one_to_all(yes)) if several() else yes


def all_say(yes: bool) -> bool:
    """Whether every process says yes. All must ask at the same point."""
    return bool(np.all(multihost_utils.process_allgather(np.asarray(yes)))) if several() else yes


def everywhere(x: jax.Array) -> np.ndarray:
    """The whole of an array that lies across the processes, in each of them."""
    return np.asarray(multihost_utils.process_allgather(x, tiled=True) if several() else x)


def told_to_stop(step: int) -> bool:
    """Whether some process was told to stop (SIGTERM) and all have agreed on this step for it."""
    return several() and multihost_utils.reached_preemption_sync_point(step)


@contextlib.contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """An event that SIGTERM or SIGINT sets, for the time of the run; the second one ends it.

    Among several processes it is never set: JAX's runtime listens for SIGTERM and agrees on a step.
    """
    stop = threading.Event()
    if several() or threading.current_thread() is not threading.main_thread():
        yield stop  # only the main thread may handle signals
        return

    def ask(number: int, frame: Any) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    previous = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def lost(error: BaseException) -> PeersLost | None:
    """What an error of the runtime means if it is that of a lost process, else None."""
    text = str(error)
    signs = ("Gloo", "Connection closed by peer", "Connection reset", "heartbeat", "barrier")
    if several() and any(sign in text for sign in signs):
        return PeersLost(
            f"process {jax.process_index()} of {jax.process_count()} lost another one "
            f"({_first_line(error)}); start all again to continue from the newest checkpoint"
        )
    return None


def finish() -> None:
    """Wait for the others and end the session with them, so that nobody is taken for lost."""
    if several():
        jax.distributed.shutdown()


def leave(code: int) -> NoReturn:
    """End this process at once. A normal exit would wait for peers that are gone."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
