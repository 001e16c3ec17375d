"""A watchdog: a run that stands still ends, and says what it was doing.

A peer that died breaks the connections to it, and JAX's heartbeats find one whose process or
machine has stopped. Neither sees a process that lives and does nothing: a reader stuck on a lost
network disk, a collective that not all have entered. So every process watches itself.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable

import jax

from jaxformer.parallel.multihost import leave


class Watchdog:
    """Ends the process with `code` once it has been at one thing for too long.

    A context manager. Waiting for data is given half of `minutes`, so that among several processes
    the one with the stalled reader speaks before those that wait for it.
    """

    def __init__(self, minutes: float, code: int, leave: Callable[[int], object] = leave) -> None:
        self._seconds, self._code, self._leave = 60 * minutes, code, leave
        self._since: tuple[float, str] = (time.monotonic() + self._seconds, "starting")
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self.doing("starting")
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._thread.join()

    def doing(self, what: str, *, data: bool = False) -> None:
        """What the process does from now on: "in step 7". Costs one assignment."""
        patience = self._seconds / 2 if data else self._seconds
        self._since = (time.monotonic() + patience, what)

    def _watch(self) -> None:
        while not self._closed.wait(min(1.0, self._seconds / 10)):
            deadline, what = self._since
            if time.monotonic() > deadline:
                who = f"process {jax.process_index()} of {jax.process_count()}"
                print(
                    f"jaxformer: {who} stands still: no sign of life while {what}; another "
                    "process, its disk or its data is stuck; start all again to continue from the "
                    "newest checkpoint (fit.hang_minutes sets the patience)",
                    file=sys.stderr,
                )
                self._leave(self._code)
                return
