"""What it means when a checkpoint cannot be written, in one line."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import traceback
from collections.abc import Iterator, Sequence
from typing import Any

from jaxformer.parallel.multihost import lost


class CheckpointFailed(RuntimeError):
    """A checkpoint could not be written; those before it are whole."""


def explained(error: Exception, what: str, folder: Any, whole: Sequence[int]) -> Exception:
    """The error to raise for one raised while `what` was written to `folder`.

    `whole`: the steps whose checkpoints are there all the same, oldest first.
    """
    if lost(error) or isinstance(error, CheckpointFailed):
        return error
    text = " ".join(str(error).split())
    # TensorStore writes less than it wanted and says only RESOURCE_EXHAUSTED.
    signs = (os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT), "RESOURCE_EXHAUSTED")
    full = any(sign in text for sign in signs)
    why = "the disk is full" if full else f"{type(error).__name__}: {text[:200]}"
    kept = f"the newest whole one is {whole[-1]}" if whole else "there is none before it"
    remedy = "free some space" if full else "see to the cause"
    return CheckpointFailed(
        f"{what} could not be written to {folder}: {why}; {kept}; {remedy} and run "
        "again to continue"
    )


def quiet() -> None:
    """Keep out of the log what orbax logs, page by page, of an error that it raises as well."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(_not_raised)


def _not_raised(record: logging.LogRecord) -> bool:
    trace = record.exc_info[2] if record.exc_info else None
    return "orbax" not in "".join(traceback.format_tb(trace))


class Ear:
    """Hears of the first error of this process while it writes.

    orbax's manager raises it only after a barrier, and where one process alone failed the others
    wait at another one: for ten minutes, as seen with two processes on a full disk.
    """

    def __init__(self) -> None:
        self.error: Exception | None = None

    def to(self, handler: Any) -> Any:
        """A checkpoint handler whose errors are heard; orbax knows handlers by their classes."""
        save, finalize = handler.async_save, handler.finalize

        async def heard_save(*args: Any, **kwargs: Any) -> Any:
            futures = await save(*args, **kwargs)
            return [_Future(future, self) for future in futures or ()]

        def heard_finalize(*args: Any, **kwargs: Any) -> None:
            with self.listening():
                finalize(*args, **kwargs)

        handler.async_save, handler.finalize = heard_save, heard_finalize
        return handler

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self.error = self.error or error
            raise


class _Future:
    def __init__(self, future: Any, ear: Ear) -> None:
        self._future, self._ear = future, ear

    def result(self, timeout: int | None = None) -> Any:
        with self._ear.listening():
            return self._future.result(timeout)
