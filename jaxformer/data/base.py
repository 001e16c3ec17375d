"""Batches as pure functions of (seed, step), and a prefetcher over them.

Nothing here has a position: a run that knows its step knows its data, and any number of hosts sees
the same global batches because each asks for its own rows of the same batch.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import grain
import jax
import jax.numpy as jnp
import numpy as np

from jaxformer.recipe import Batch, ConfigError, Data, DrawsOnDevice

Example = Mapping[str, Any]  # one row: numpy arrays or scalars, no batch axis
Transform = Callable[[Example, np.random.Generator], Example]

__all__ = [
    "Arrays",
    "Deferred",
    "DeviceData",
    "Epoch",
    "Example",
    "FixedData",
    "IndexedData",
    "Numbered",
    "ShuffledArrays",
    "Source",
    "Transform",
    "prefetch",
]


class Source(Protocol):
    """Random access to examples; `__getitem__` is pure and safe to call from several threads."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


@dataclasses.dataclass(frozen=True, eq=False)
class Arrays:
    """A source over arrays in memory that share their first axis."""

    arrays: Mapping[str, np.ndarray]

    def __post_init__(self) -> None:
        lengths = {name: len(array) for name, array in self.arrays.items()}
        if len(set(lengths.values())) != 1:
            raise ConfigError(f"Arrays: need arrays with one common first axis, got {lengths}")

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))

    def __getitem__(self, index: int) -> Example:
        return {name: array[index] for name, array in self.arrays.items()}


@dataclasses.dataclass(frozen=True, eq=False)
class IndexedData:
    """Endless shuffled batches of a random-access source.

    Every epoch is a fresh permutation; batches run across the border of two epochs, so none is
    short and every example is used once per epoch. Row r of batch k is example k * batch_size + r
    of that stream, and its transforms draw from a generator of their own.
    """

    source: Source
    batch_size: int
    seed: int = 0
    transforms: Sequence[Transform] = ()
    shuffle: bool = True

    def __post_init__(self) -> None:
        _check_batch_size(self.batch_size)
        _check_seed(self.seed)
        _check_not_empty(self.source)
        if len(self.source) < self.batch_size:
            raise ConfigError(
                f"data.batch_size: {self.batch_size} exceeds the {len(self.source)} examples of "
                f"{_name(self.source)}; use at most {len(self.source)} or give more examples"
            )

    @functools.cached_property
    def _stream(self) -> grain.MapDataset:
        stream = grain.MapDataset.source(self.source).seed(self.seed)
        if self.shuffle:
            stream = stream.shuffle()
        return _transformed(stream.repeat(), self.transforms)

    def batch(self, step: int, rows: slice = slice(None)) -> Batch:
        first = step * self.batch_size
        return _stack([self._stream[first + row] for row in range(self.batch_size)[rows]])

    def spec(self) -> Batch:
        return _spec(self.batch(0, slice(0, 1)), self.batch_size)


@dataclasses.dataclass(frozen=True, eq=False)
class ShuffledArrays:
    """What `IndexedData` gives of arrays in memory that need no transform, a batch at a time.

    Every epoch is a fresh permutation, and batches run across its end. Rows are gathered at once: a
    batch of 128 small rows took 0.05 ms, where one by one they took 6.
    """

    arrays: Mapping[str, np.ndarray]
    batch_size: int
    seed: int = 0

    def __post_init__(self) -> None:
        _check_batch_size(self.batch_size)
        _check_seed(self.seed)
        _check_not_empty(Arrays(self.arrays))

    @functools.cached_property
    def _order(self) -> Callable[[int], np.ndarray]:
        count = len(Arrays(self.arrays))

        @functools.lru_cache(maxsize=8)  # threads that read ahead may be in two epochs
        def order(epoch: int) -> np.ndarray:
            return np.random.default_rng([self.seed, epoch]).permutation(count)

        return order

    def batch(self, step: int, rows: slice = slice(None)) -> Batch:
        index = step * self.batch_size + np.arange(self.batch_size)[rows]
        epochs, places = np.divmod(index, len(Arrays(self.arrays)))
        chosen = np.empty_like(places)
        for epoch in np.unique(epochs):
            chosen[epochs == epoch] = self._order(int(epoch))[places[epochs == epoch]]
        return {name: array[chosen] for name, array in self.arrays.items()}

    def spec(self) -> Batch:
        return _spec(self.arrays, self.batch_size)


@dataclasses.dataclass(frozen=True, eq=False)
class Epoch:
    """One pass over a source in its own order, for evaluation: `len(epoch)` batches.

    The last batch is filled up with repeated examples. Every batch carries "weight" (B,) float32,
    the source's own or 1, and 0 on the filling. `limit` keeps the first so many batches.
    """

    source: Source
    batch_size: int
    seed: int = 0
    transforms: Sequence[Transform] = ()
    limit: int | None = None

    def __post_init__(self) -> None:
        _check_batch_size(self.batch_size)
        _check_seed(self.seed)
        _check_not_empty(self.source)
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"data.limit: {self.limit} batches; give at least 1, or None for all")

    def __len__(self) -> int:
        batches = -(-len(self.source) // self.batch_size)
        return batches if self.limit is None else min(batches, self.limit)

    @functools.cached_property
    def _examples(self) -> grain.MapDataset:
        stream = grain.MapDataset.source(self.source).seed(self.seed)
        return _transformed(stream, self.transforms)

    def batch(self, step: int, rows: slice = slice(None)) -> Batch:
        if not 0 <= step < len(self):
            raise IndexError(f"batch {step} of an epoch of {len(self)} batches")
        index = step * self.batch_size + np.arange(self.batch_size)[rows]
        valid = index < len(self.source)
        batch = _stack([self._examples[int(i)] for i in np.where(valid, index, 0)])
        weight = np.asarray(batch.get("weight", 1.0), np.float32) * valid
        return {**batch, "weight": weight.astype(np.float32)}

    def spec(self) -> Batch:
        return _spec(self.batch(0, slice(0, 1)), self.batch_size)


@dataclasses.dataclass(frozen=True, eq=False)
class Deferred:
    """Data made when its first batch is asked for, with rows known beforehand.

    Whatever reads files is wrapped in one, so that a recipe can be built, shown and lowered where
    the files are not. `row` is {name: (shape, dtype)} of one example.
    """

    make: Callable[[], Data]
    batch_size: int
    row: Mapping[str, tuple[tuple[int, ...], Any]]

    def __post_init__(self) -> None:
        _check_batch_size(self.batch_size)

    @functools.cached_property
    def _data(self) -> Any:
        return self.make()

    def __len__(self) -> int:
        return len(self._data)

    def batch(self, step: int, rows: slice = slice(None)) -> Batch:
        batch = self._data.batch(step, rows)
        for name, (shape, dtype) in self.row.items():
            found = batch[name]
            if found.shape[1:] != shape or found.dtype != dtype:
                raise ConfigError(
                    f"data: {name!r} is {found.dtype}{found.shape[1:]} in the files, the config "
                    f"says {np.dtype(dtype).name}{shape}; change the config or the files"
                )
        return batch

    def spec(self) -> Batch:
        return {
            name: jax.ShapeDtypeStruct((self.batch_size, *shape), dtype)
            for name, (shape, dtype) in self.row.items()
        }


@dataclasses.dataclass(frozen=True, eq=False)
class FixedData:
    """The same arrays at every step: full-batch training, calibration on one batch."""

    arrays: Batch

    @property
    def batch_size(self) -> int:
        return len(Arrays(self.arrays))

    def batch(self, step: int, rows: slice = slice(None)) -> Batch:
        del step
        return {name: array[rows] for name, array in self.arrays.items()}

    def spec(self) -> Batch:
        return _spec(self.arrays, self.batch_size)


@dataclasses.dataclass(frozen=True)
class DeviceData:
    """Batches drawn inside the jitted step; see `jaxformer.recipe.DrawsOnDevice`.

    `draw_rows(step_key, row_keys)` makes the rows of `row_keys` (b,), b any part of the batch:
    what the rows share (a length, a covariance) comes from `step_key`, what is a row's own from
    its key. A batch is then the same however it is sliced, micro-batched or sharded. The seed
    travels in the address, so that one compiled step serves all seeds.
    """

    draw_rows: Callable[[jax.Array, jax.Array], Batch]
    batch_size: int
    seed: int = 0

    def __post_init__(self) -> None:
        _check_batch_size(self.batch_size)
        _check_seed(self.seed)

    def batch(self, step: int, rows: slice = slice(None)) -> Batch:
        return _address(self.seed, step, self.batch_size, rows)

    def spec(self) -> Batch:
        return _spec(self.batch(0, slice(0, 1)), self.batch_size)

    def draw(self, batch: Batch) -> Batch:
        step_key = jax.random.fold_in(jax.random.key(batch["seed"][0]), batch["step"][0])
        row_keys = jax.vmap(jax.random.fold_in, (None, 0))(step_key, jnp.asarray(batch["row"]))
        return self.draw_rows(step_key, row_keys)


@dataclasses.dataclass(frozen=True)
class Numbered:
    """`data` with the address of its rows beside them: "seed", "step" and "row", each (B,).

    For what a task draws in common for all rows of a step, such as positions: drawn from
    fold_in(key(seed), step), it is the same in every micro-batch and after a restart.
    """

    data: Data
    seed: int = 0

    def __post_init__(self) -> None:
        _check_seed(self.seed)

    @property
    def batch_size(self) -> int:
        return self.data.batch_size

    def batch(self, step: int, rows: slice = slice(None)) -> Batch:
        address = _address(self.seed, step, self.batch_size, rows)
        return {"rows": self.data.batch(step, rows), **address}

    def spec(self) -> Batch:
        address = _address(self.seed, 0, self.batch_size, slice(0, 1))
        return {"rows": self.data.spec(), **_spec(address, self.batch_size)}

    def draw(self, batch: Batch) -> Batch:
        rows = batch["rows"]
        rows = self.data.draw(rows) if isinstance(self.data, DrawsOnDevice) else rows
        return {**rows, **{name: batch[name] for name in ("seed", "step", "row")}}


def _address(seed: int, step: int, batch_size: int, rows: slice) -> Batch:
    """The address of rows of a batch: "seed" uint32, "step" int32, "row" int32, each (rows,)."""
    row = np.arange(batch_size, dtype=np.int32)[rows]
    return {
        "seed": np.full_like(row, seed, dtype=np.uint32),
        "step": np.full_like(row, step),
        "row": row,
    }


def prefetch(
    data: Data,
    start_step: int = 0,
    rows: slice = slice(None),
    *,
    depth: int = 2,
    stop: int | None = None,
) -> Generator[tuple[int, Batch]]:
    """Yield (step, batch) for start_step, start_step + 1, ..., up to `stop`, read ahead in threads.

    `depth` batches are read at once, each by its own thread: steps need no order, so there is no
    queue to block on. An error in batch k is raised where step k is asked for. Closing the iterator
    (or dropping it) abandons what is under way without waiting for it.
    """
    if depth < 1:
        raise ConfigError(f"data.prefetch: depth {depth}; give at least 1")
    steps = itertools.count(start_step) if stop is None else iter(range(start_step, stop))
    pool = ThreadPoolExecutor(depth, thread_name_prefix="prefetch")
    try:
        ahead = collections.deque(
            (step, pool.submit(data.batch, step, rows)) for step in itertools.islice(steps, depth)
        )
        while ahead:
            step, future = ahead.popleft()
            batch = future.result()
            ahead.extend(
                (later, pool.submit(data.batch, later, rows))
                for later in itertools.islice(steps, 1)
            )
            yield step, batch
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _transformed(stream: grain.MapDataset, transforms: Sequence[Transform]) -> grain.MapDataset:
    for transform in transforms:
        stream = stream.random_map(transform)
    return stream


def _spec(batch: Batch, batch_size: int) -> Batch:
    """The shapes of a batch of `batch_size` rows, from any of its rows."""
    return {
        name: jax.ShapeDtypeStruct((batch_size, *array.shape[1:]), array.dtype)
        for name, array in batch.items()
    }


def _stack(examples: Sequence[Example]) -> Batch:
    """Stack examples that agree in keys and shapes; name the key that does not."""
    batch = {}
    for name in examples[0]:
        values = [np.asarray(example[name]) for example in examples]
        shapes = sorted({value.shape for value in values})
        if len(shapes) > 1:
            raise ConfigError(
                f"data: examples differ in the shape of {name!r}: {shapes[0]} and {shapes[1]}; "
                "make them equal with a transform (crop, pad) or in the source"
            )
        batch[name] = np.stack(values)
    return batch


def _check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise ConfigError(f"data.batch_size: {batch_size}; give at least 1")


def _check_seed(seed: int) -> None:
    if not 0 <= seed < 2**32:
        raise ConfigError(f"data.seed: {seed}; give an integer from 0 to 2**32 - 1")


def _check_not_empty(source: Source) -> None:
    if not len(source):
        raise ConfigError(f"data: {_name(source)} has no examples; check its path, split or length")


def _name(source: Source) -> str:
    return type(source).__name__
