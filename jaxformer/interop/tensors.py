"""Named tensors in files: read one at a time, never executed; written whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax.numpy as jnp
import numpy as np

from jaxformer.errors import ConfigError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SHARD_BYTES = 5 * 10**9  # of a written file, as the Hugging Face libraries cut them
PAGE_BYTES = 64 * 2**20  # a JSON page beyond this is not one


class TensorFileError(ConfigError):
    """A file of tensors that is damaged, hostile or not what it should be."""


class Tensors(Protocol):
    """Named tensors of one or several files."""

    @property
    def names(self) -> tuple[str, ...]:
        """In the order in which they lie, so that reading in this order is sequential."""
        ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def read(self, name: str) -> np.ndarray:
        """The tensor, in the type of the file; raises `TensorFileError` where it is not finite."""
        ...

    def where(self, name: str) -> str:
        """The file of a tensor, for messages."""
        ...


class Held:
    """Tensors in memory (of `source`), as `Tensors`."""

    def __init__(self, arrays: Mapping[str, Any], source: str = "memory") -> None:
        self._arrays, self._source = dict(arrays), source
        self.names = tuple(self._arrays)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._arrays[name].shape)

    def read(self, name: str) -> np.ndarray:
        return _finite(np.asarray(self._arrays[name]), self._source, name)

    def where(self, name: str) -> str:
        del name
        return self._source


class Safetensors:
    """One or more `.safetensors` files, mapped into memory and read tensor by tensor.

    The library checks every header before anything is allocated: its length against the file,
    types, and that the tensors tile the file without gap or overlap.
    """

    def __init__(self, files: list[Path]) -> None:
        from safetensors import SafetensorError, safe_open

        self._file: dict[str, Path] = {}
        self._open: dict[Path, Any] = {}
        self.metadata: dict[str, str] = {}
        for path in files:
            try:
                handle = safe_open(path, framework="np")
                names = handle.offset_keys()
            except (SafetensorError, OSError, ValueError) as error:
                raise TensorFileError(
                    f"{path}: is not a readable safetensors file ({_line(error)}); download or "
                    "write it again"
                ) from error
            self._open[path] = handle
            self.metadata |= handle.metadata() or {}
            for name in names:
                if name in self._file:
                    raise TensorFileError(
                        f"{path}: holds tensor {name!r}, which {self._file[name]} holds as well; "
                        "keep it in one file"
                    )
                self._file[name] = path
        self.names = tuple(self._file)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._open[self._file[name]].get_slice(name).get_shape())

    def read(self, name: str) -> np.ndarray:
        path = self._file[name]
        try:
            array = self._open[path].get_tensor(name)
        except Exception as error:  # types that NumPy lacks, such as 4-bit floats
            raise TensorFileError(
                f"{path}: tensor {name!r} cannot be read ({_line(error)}); store it as float32, "
                "float16 or bfloat16"
            ) from error
        return _finite(array, path, name)

    def where(self, name: str) -> str:
        return str(self._file[name])


def open_tensors(path: str | Path) -> Tensors:
    """The tensors of a Hugging Face folder, or of a `.safetensors`, `.npz`, `.pth` or `.pt` file.

    A `.pth` is read by `torch.load(weights_only=True)`, which executes nothing, if torch is
    installed; a state dict inside it is found under the names that training scripts use.

    Raises:
        TensorFileError: no such file, or one that is not what its name says.
    """
    path = Path(path).expanduser()
    readers: dict[str, Callable[[Path], Tensors]] = {
        ".safetensors": lambda p: Safetensors([p]),
        ".npz": _open_npz,
        ".pth": _open_torch,
        ".pt": _open_torch,
        ".bin": _open_torch,
    }
    if path.is_dir():
        return Safetensors(_files_of(path))
    if path.suffix not in readers or not path.is_file():
        raise TensorFileError(
            f"{path}: is not a folder with {SINGLE} nor a file ending in one of "
            f"{', '.join(readers)}; give one"
        )
    return readers[path.suffix](path)


def _files_of(folder: Path) -> list[Path]:
    """The files of a Hugging Face folder, by its index where it has one."""
    index = folder / INDEX
    if not index.is_file():
        if (folder / SINGLE).is_file():
            return [folder / SINGLE]
        pickles = sorted(p.name for p in folder.glob("*.bin"))
        why = f"only {pickles[0]}, a pickle: convert it to safetensors" if pickles else "no weights"
        raise TensorFileError(f"{folder}: has neither {SINGLE} nor {INDEX} ({why})")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise TensorFileError(f"{index}: has no 'weight_map' from tensors to files")
    for tensor, name in weight_map.items():
        # Names come from outside: a path in one could point anywhere.
        plain = isinstance(name, str) and name == Path(name).name and name.endswith(".safetensors")
        if not plain:
            raise TensorFileError(
                f"{index}: puts tensor {tensor!r} into {name!r}; must be the plain name of a "
                ".safetensors file beside it"
            )
        if not (folder / name).is_file():
            raise TensorFileError(f"{index}: names {name!r}, which is missing; download it too")
    files = [folder / name for name in sorted(set(weight_map.values()))]
    found = Safetensors(files)
    for tensor, name in weight_map.items():
        if tensor not in found.names or Path(found.where(tensor)).name != name:
            raise TensorFileError(f"{folder / name}: lacks tensor {tensor!r}, which {INDEX} names")
    return files


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        TensorFileError: missing, larger than a page can be, or not a JSON object.
    """
    path = Path(path)
    try:
        if path.stat().st_size > PAGE_BYTES:
            raise TensorFileError(f"{path}: {path.stat().st_size} bytes are too many for a page")
        page = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise TensorFileError(f"{path}: cannot be read as JSON ({_line(error)})") from error
    if not isinstance(page, dict):
        raise TensorFileError(f"{path}: must hold a JSON object, got a {type(page).__name__}")
    return page


def _open_npz(path: Path) -> Tensors:
    try:
        with np.load(path, allow_pickle=False) as file:
            return Held({name: file[name] for name in file.files}, str(path))
    except Exception as error:  # zipfile, zlib and NumPy raise many kinds
        raise TensorFileError(f"{path}: is not a readable npz file ({_line(error)})") from error


def _open_torch(path: Path) -> Tensors:
    try:
        import torch
    except ImportError as error:
        raise TensorFileError(
            f"{path}: reading it needs torch; install torch, or convert it to safetensors"
        ) from error
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds, some its own
        raise TensorFileError(
            f"{path}: torch cannot read it as weights alone ({_line(error)}); save its state dict"
        ) from error
    arrays = dict(_state_dict(loaded, torch))
    if not arrays:
        raise TensorFileError(f"{path}: holds no tensors; save the model's state dict")
    return Held(arrays, str(path))


def _state_dict(loaded: Any, torch: Any) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of what was saved: a state dict, or a page that holds one."""
    inside = ("state_dict", "model_state_dict", "model", "module", "net")
    while isinstance(loaded, Mapping):
        child = next((loaded[k] for k in inside if isinstance(loaded.get(k), Mapping)), None)
        if child is None:
            break
        loaded = child
    if isinstance(loaded, Mapping):
        for name, x in loaded.items():
            if isinstance(x, torch.Tensor):
                name = str(name).removeprefix("module.")  # of a model trained in parallel
                x = x.detach()
                if x.dtype == torch.bfloat16:
                    yield name, x.view(torch.uint16).numpy().view(jnp.bfloat16)
                else:
                    yield name, x.numpy()


def _finite(array: np.ndarray, source: str | Path, name: str) -> np.ndarray:
    if jnp.issubdtype(array.dtype, jnp.inexact):
        bad = array.size - int(np.isfinite(array).sum())
        if bad:
            raise TensorFileError(
                f"{source}: tensor {name!r} has {bad} values that are not finite; the file is "
                "damaged, or the training that wrote it diverged"
            )
    return array


def save_tensors(
    folder: Path,
    tensors: Iterator[tuple[str, np.ndarray]],
    *,
    metadata: Mapping[str, str] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write `model.safetensors`, or numbered shards and their index, into an existing `folder`.

    Tensors are held until a shard is full, so the peak in memory is one shard.
    """
    from safetensors.numpy import save_file

    given = {"format": "pt", **(metadata or {})}
    shard: dict[str, np.ndarray] = {}
    shards: list[list[str]] = []
    size = total = 0

    def flush() -> None:
        save_file(shard, folder / f"shard-{len(shards)}", metadata=given)
        shards.append(list(shard))
        shard.clear()

    for name, array in tensors:
        if shard and size + array.nbytes > shard_bytes:
            flush()
            size = 0
        shard[name] = np.ascontiguousarray(array)
        size, total = size + array.nbytes, total + array.nbytes
    flush()
    if len(shards) == 1:
        os.replace(folder / "shard-0", folder / SINGLE)
        return
    weight_map = {}
    for i, names in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        os.replace(folder / f"shard-{i}", folder / file)
        weight_map |= dict.fromkeys(names, file)
    page = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(page, indent=2) + "\n")


@contextlib.contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """A folder to fill that appears at `path` when all went well, and not at all otherwise.

    Raises:
        ConfigError: there is something at `path` already.
    """
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ConfigError(f"out: {path} exists already; give a new folder, or remove it")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as made:
        inside = Path(made) / "content"
        inside.mkdir()
        yield inside
        if path.exists():
            path.rmdir()
        os.replace(inside, path)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
