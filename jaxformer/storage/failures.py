"""What it means when a checkpoint cannot be written, in one line."""

from __future__ import annotations

import errno
import logging
import os
import traceback
from collections.abc import Sequence
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
