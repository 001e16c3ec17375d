"""Writes to a checkpoint manager in the background, and what becomes of those that fail."""

from __future__ import annotations

import contextlib
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
from etils import epath

from jaxformer.storage import digest
from jaxformer.storage.failures import CheckpointFailed, Ear, explained, quiet

POLL = 0.02  # seconds


class Writer:
    """One write at a time: copied off the device at once, then written, then summed up."""

    def __init__(self, manager: Any, directory: epath.Path, ear: Ear) -> None:
        """`manager` is an `orbax.checkpoint.CheckpointManager` of `directory`, heard by `ear`."""
        self._manager, self._directory, self._ear = manager, directory, ear
        self._background = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._saving: Future[None] | None = None
        quiet()

    def save(self, step: int, items: Any) -> None:
        """Start writing; returns once the arrays are copied off the device.

        Raises:
            CheckpointFailed: it could not be begun.
        """
        try:
            self._manager.save(step, args=items, force=True)
        except Exception as error:
            raise self._failure(step, error) from error
        self._saving = self._background.submit(self._finish, step)

    def _finish(self, step: int) -> None:
        """Wait for the last byte, then note the checksums."""
        try:
            while self._manager.is_saving_in_progress():
                if self._ear.error is not None:
                    raise self._ear.error
                time.sleep(POLL)
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._failure(step, error) from error
        try:
            digest.write(self._directory / str(step), jax.process_index(), jax.process_count())
        except Exception as error:  # the checkpoint is committed and whole without them
            what = f"the checksums of checkpoint {step}"
            whole = sorted(self._manager.all_steps())
            raise explained(error, what, self._directory, whole) from error

    def _failure(self, step: int, error: Exception) -> Exception:
        whole = sorted(saved for saved in self._manager.all_steps() if saved != step)
        return explained(error, f"checkpoint {step}", self._directory, whole)

    def check(self) -> None:
        """Raise what went wrong, if anything did by now."""
        if self._saving is not None and self._saving.done():
            self.wait()

    def wait(self) -> None:
        """Wait for the write under way.

        Raises:
            CheckpointFailed: it could not be written.
        """
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.result()

    def close(self, error: BaseException | None) -> None:
        """Wait, unless a write failed already, and close the manager.

        An exit without this leaves orbax's event loop to print a storm of errors.
        """
        failed = isinstance(error, CheckpointFailed)
        try:
            if not failed:
                self.wait()
        except CheckpointFailed:
            failed = True
            raise
        finally:
            self._background.shutdown()
            with contextlib.suppress(*([Exception] if failed else [])):
                self._manager.close()  # says once more what failed
