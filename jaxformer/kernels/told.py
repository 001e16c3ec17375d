"""What the kernels log about their choices, told to the user once."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def told(say: Callable[[str], None]) -> Iterator[None]:
    """Say once which kernel each call of a program runs, and why, when it is traced."""
    said = set()

    class Once(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            text = record.getMessage()
            if text not in said:
                said.add(text)
                say(text)

    log, handler = logging.getLogger("jaxformer.kernels"), Once()
    before = log.level, log.propagate
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False  # to absl's handler, which would say it again for every layer
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(before[0])
        log.propagate = before[1]
