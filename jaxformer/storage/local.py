"""A second, faster tier of checkpoints: every process keeps its own shards on its own disk.

For restarts on the same hosts, which are the most frequent: a crash, a lost peer, a hang. Copies
are made more often than the shared disk could take them. They serve only the mesh and the number
of processes that wrote them, and only if every process still has the same step; otherwise the
checkpoints in the workdir do. orbax's emergency manager does the same for replicas of TPU slices,
and needs a mesh axis of slices to do so.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import zipfile
import zlib
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxformer.parallel.multihost import all_say, several
from jaxformer.storage.places import AnyPath, place

KEPT = 2  # newest copies; the older one stands while the newer is written
_PAGE = "page"
_UNREADABLE = (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile, zlib.error)


class LocalTier:
    """The copies of one run on this host's disk. Close it to wait for the last one."""

    def __init__(self, folder: AnyPath, workdir: AnyPath) -> None:
        """`folder` is on a local disk and may be shared by runs; `workdir` tells them apart."""
        run = f"{zlib.crc32(str(place(workdir)).encode()):08x}"
        who = f"{jax.process_index()}-of-{jax.process_count()}"
        self.folder = Path(folder) / run / who
        self.folder.mkdir(parents=True, exist_ok=True)
        self._background = ThreadPoolExecutor(1, thread_name_prefix="local")
        self._saving: Future[None] | None = None

    def steps(self) -> list[int]:
        """Steps of which this process has its part, oldest first."""
        return sorted(int(path.stem) for path in self.folder.glob("*.npz"))

    def save(self, step: int, arrays: Mapping[str, jax.Array], page: Mapping[str, Any]) -> None:
        """Copy this process's shards off the devices; write them in the background."""
        self.wait()
        parts = {
            _key(name, shard.index, array.shape): np.array(shard.data)  # the state is donated
            for name, array in arrays.items()
            for shard in array.addressable_shards
        }
        self._saving = self._background.submit(self._write, step, parts, dict(page))

    def _write(self, step: int, parts: dict[str, np.ndarray], page: dict[str, Any]) -> None:
        beside = self.folder / f"{step}.partial"
        with beside.open("wb") as file:
            # Bytes, because the format has no bfloat16; it keeps a CRC-32 of each member.
            raw = {name: np.frombuffer(part.tobytes(), np.uint8) for name, part in parts.items()}
            raw[_PAGE] = np.frombuffer(json.dumps(page).encode(), np.uint8)
            np.savez(file, **raw)  # type: ignore[arg-type]
        beside.replace(self.folder / f"{step}.npz")
        for old in self.steps()[:-KEPT]:
            (self.folder / f"{old}.npz").unlink()

    def newest(self, after: int) -> list[int]:
        """Steps beyond `after` that every process has, newest first."""
        mine = np.full(KEPT + 1, -1, np.int64)
        found = self.steps()[-len(mine) :]
        mine[: len(found)] = found
        everyone = multihost_utils.process_allgather(mine) if several() else mine[None]
        common = set.intersection(*(set(row.tolist()) for row in np.atleast_2d(everyone)))
        return sorted((step for step in common if step > after), reverse=True)

    def page(self, step: int) -> dict[str, Any] | None:
        """The page of a step, None where it cannot be read; `restore` fails as well then."""
        with contextlib.suppress(*_UNREADABLE), np.load(self.folder / f"{step}.npz") as file:
            return json.loads(file[_PAGE].tobytes())
        return None

    def restore(
        self, step: int, wanted: Mapping[str, jax.ShapeDtypeStruct]
    ) -> dict[str, jax.Array] | None:
        """The arrays of a step; None where some process cannot: damage, or another mesh."""
        found = None
        with contextlib.suppress(*_UNREADABLE), np.load(self.folder / f"{step}.npz") as file:
            page = file[_PAGE]  # its checksum is compared as well
            found = {name: _parts(name, leaf, file) for name, leaf in wanted.items()}
            del page
        if not all_say(found is not None) or found is None:
            return None
        return {
            name: jax.make_array_from_single_device_arrays(
                leaf.shape,
                leaf.sharding,
                [jax.device_put(part, device) for device, part in found[name]],
            )
            for name, leaf in wanted.items()
        }

    def forget(self, after: int = -1) -> None:
        """Drop the steps beyond `after`: the run begins there, and they are another's."""
        for step in self.steps():
            if step > after:
                (self.folder / f"{step}.npz").unlink()

    def wait(self) -> None:
        """Wait for the write under way. One that fails costs its copy, and no more."""
        saving, self._saving = self._saving, None
        if saving is not None and isinstance(saving.exception(), OSError):
            shutil.rmtree(self.folder, ignore_errors=True)  # a full disk: make room, try again
            self.folder.mkdir(parents=True, exist_ok=True)
        elif saving is not None:
            saving.result()

    def close(self) -> None:
        self.wait()
        self._background.shutdown()


def _key(name: str, index: tuple[slice, ...], shape: tuple[int, ...]) -> str:
    bounds = (part.indices(size)[:2] for part, size in zip(index, shape, strict=True))
    return f"{name}@{','.join(f'{a}:{b}' for a, b in bounds)}"


def _parts(name: str, leaf: Any, file: Any) -> list[tuple[jax.Device, np.ndarray]]:
    """(device, its part) for every device of this process."""
    found = []
    for device, index in leaf.sharding.addressable_devices_indices_map(leaf.shape).items():
        shape = leaf.sharding.shard_shape(leaf.shape)
        raw = file[_key(name, index, leaf.shape)]
        found.append((device, raw.view(leaf.dtype).reshape(shape)))
    return found
