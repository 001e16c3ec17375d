"""An xprof trace of chosen steps."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from jaxformer.errors import ConfigError


class Trace:
    """An xprof trace of steps `first` to `last` alone, under `<workdir>/profile`.

    Of several processes the first one writes it: all run the same program.
    """

    def __init__(
        self, steps: tuple[int, int] | None, workdir: Path | None, say: Callable[[str], None]
    ) -> None:
        if steps is not None and workdir is None:
            raise ConfigError("profile: needs a workdir to write the trace to")
        self._steps = steps if steps and jax.process_index() == 0 else (1, 0)
        self._say, self._open = say, False
        self.folder = Path(workdir or ".") / "profile"

    def step(self, number: int, state: Any) -> contextlib.AbstractContextManager[Any]:
        """A context for the call of a step, whose input is `state`."""
        wanted = self._steps[0] <= number <= self._steps[1]
        if wanted != self._open:
            jax.block_until_ready(state)  # no step before or after it is in the trace
            self._start(number) if wanted else self.close()
        if not wanted:
            return contextlib.nullcontext()
        return jax.profiler.StepTraceAnnotation("step", step_num=number)

    def _start(self, number: int) -> None:
        options = jax.profiler.ProfileOptions()
        # By default the name is the second, in which a trace of the next phase may begin too.
        options.session_id = f"{time.strftime('%Y_%m_%d_%H_%M_%S')}_step_{number}"
        jax.profiler.start_trace(self.folder, profiler_options=options)
        self._open = True

    def close(self) -> None:
        """End the trace, where one is under way; everything in flight must be done."""
        if self._open:
            self._open = False
            jax.profiler.stop_trace()
            first, last = self._steps
            self._say(f"profile of steps {first} to {last}: {self.folder} (open it with xprof)")


def traced_steps(text: str) -> tuple[int, int]:
    """(10, 15) of "steps=10..15" or "10..15", both ends included.

    Raises:
        ConfigError: not of that form.
    """
    found = re.fullmatch(r"(?:steps=)?(\d+)\.\.(\d+)", text)
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        raise ConfigError(f"profile: {text!r} is not like steps=10..15 (first..last, from 1)")
    return int(found[1]), int(found[2])
