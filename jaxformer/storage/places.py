"""Paths of runs: on this machine, or gs://bucket/run and whatever else etils and fsspec reach."""

from __future__ import annotations

import os
from pathlib import Path

from etils import epath

AnyPath = str | os.PathLike[str]


def remote(path: AnyPath) -> bool:
    """Whether it is in an object store: nothing there can be appended to."""
    return "://" in os.fspath(path)


def place(path: AnyPath) -> epath.Path:
    """The path, absolute. `epath.Path("gs://a").absolute()` would be "./gs:/a" (etils 1.15)."""
    return epath.Path(path if remote(path) else Path(path).expanduser().absolute())
