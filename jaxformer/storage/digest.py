"""Checksums of a finished checkpoint, written beside it and compared before it is read.

OCDBT guards its index by CRC-32C, but not the arrays: of random bits flipped in a data file, orbax
0.12.8 restored every one without a word. A missing or short file it does notice, with errors of
many types and pages of text. So every process writes the size and the CRC-32 of the files it wrote
into `<step>/digest.<process>-of-<processes>.json`, in the background, once the step is committed.
"""

from __future__ import annotations

import json
import re
import sys
import zlib
from collections.abc import Iterator, Mapping, Sequence

import jax
from etils import epath

from jaxformer.parallel.multihost import all_say

_PAGE = re.compile(r"digest\.(\d+)-of-(\d+)\.json")
_PART = 4 * 2**20  # bytes read at once


class CheckpointDamaged(RuntimeError):
    """A checkpoint whose files are not those that were written."""


def write(folder: epath.Path, process: int, processes: int) -> None:
    """Note the files of this process in a committed checkpoint; the first has those of nobody."""
    mine = {
        name: _sum(folder / name) for name in _files(folder) if _writer(name, processes) == process
    }
    text = json.dumps({"files": mine, "sum": _own_sum(mine)}, indent=1)
    page = folder / f"digest.{process}-of-{processes}.json"
    beside = page.with_suffix(".partial")  # a kill here must not leave half a page
    try:
        beside.write_text(text)
        beside.rename(page)
    finally:
        beside.unlink(missing_ok=True)


def verify(folder: epath.Path, reader: int = 0, readers: int = 1) -> bool:
    """Compare the files with what was written; each of several readers takes its share.

    Returns whether all could be compared: a run that was killed right after the commit left no
    page, or not all of them.

    Raises:
        CheckpointDamaged: a file is missing or another; names it.
    """
    pages = {name: found for name in _names(folder) if (found := _PAGE.fullmatch(name))}
    for name, found in pages.items():
        if int(found[1]) % readers == reader:
            _compare(folder, _read(folder, name))
    counts = {int(found[2]) for found in pages.values()}
    return len(counts) == 1 and len(pages) == counts.pop()


def verify_together(folder: epath.Path) -> None:
    """`verify` by all processes of a run, which all come to the same end.

    Raises:
        CheckpointDamaged: one of them found a file missing or another.
    """
    fault = None
    try:
        verify(folder, jax.process_index(), jax.process_count())
    except CheckpointDamaged as error:
        fault = error
    if not all_say(fault is None):
        raise fault or CheckpointDamaged(f"{folder}: another process says so")


def newest_whole(folder: epath.Path, steps: Sequence[int]) -> int | None:
    """The newest of `steps` that is whole, None of none; damaged ones are renamed and told of.

    Raises:
        CheckpointDamaged: all are damaged.
    """
    damaged = None
    for step in sorted(steps, reverse=True):
        try:
            verify_together(folder / str(step))
            return step
        except CheckpointDamaged as error:
            damaged = error
        print(f"checkpoint {step} is damaged and skipped: {damaged}", file=sys.stderr)
        if jax.process_index() == 0:
            (folder / str(step)).rename(folder / f"{step}.damaged")
        all_say(True)  # nobody looks again before it is renamed
    if damaged is not None:
        raise CheckpointDamaged(f"no whole checkpoint is left in {folder}: {damaged}")
    return None


def _compare(folder: epath.Path, files: Mapping[str, list[int]]) -> None:
    for name, (size, crc) in files.items():
        path = folder / name
        if not path.exists():
            raise CheckpointDamaged(f"{path}: the file is missing")
        found = path.stat().length
        if found != size:
            raise CheckpointDamaged(f"{path}: has {found} of {size} bytes")
        if _sum(path) != [size, crc]:
            raise CheckpointDamaged(f"{path}: its checksum is not that of what was written")


def _read(folder: epath.Path, name: str) -> dict[str, list[int]]:
    try:
        page = json.loads((folder / name).read_text())
        if page["sum"] == _own_sum(page["files"]):
            return page["files"]
    except (ValueError, KeyError, TypeError):
        pass
    raise CheckpointDamaged(f"{folder / name}: the page of checksums is damaged itself")


def _own_sum(files: Mapping[str, list[int]]) -> int:
    return zlib.crc32(json.dumps(files, sort_keys=True).encode())


def _writer(name: str, processes: int) -> int:
    """Which process wrote a file: OCDBT has a folder for each."""
    found = re.search(r"(?:^|/)ocdbt\.process_(\d+)/", name)
    return int(found[1]) if found and int(found[1]) < processes else 0


def _names(folder: epath.Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def _files(folder: epath.Path, prefix: str = "") -> Iterator[str]:
    """Names relative to `folder` of all files below it but the pages."""
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            yield from _files(path, f"{prefix}{path.name}/")
        elif not path.name.startswith("digest."):
            yield prefix + path.name


def _sum(path: epath.Path) -> list[int]:
    size, crc = 0, 0
    with path.open("rb") as file:
        while part := file.read(_PART):
            size, crc = size + len(part), zlib.crc32(part, crc)
    return [size, crc]
