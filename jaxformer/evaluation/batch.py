"""How many rows of a batch fit into memory, asked of the compiler."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.errors import JaxRuntimeError
from jax.sharding import Mesh

from jaxformer.errors import ConfigError
from jaxformer.parallel.sharding import batch_sharding
from jaxformer.recipe import Batch, Task, TrainState

SHARE = 0.8  # of the free memory


def free_bytes(device: Any) -> float:
    """What is left of a device's memory; on a CPU, of the machine's, shared by its devices."""
    stats = device.memory_stats() if device.platform != "cpu" else None
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    page = Path("/proc/meminfo")
    if page.is_file():
        fields = dict(line.split(":") for line in page.read_text().splitlines())
        return 1024 * int(fields["MemAvailable"].split()[0]) / jax.local_device_count()
    return float("inf")


def rows_that_fit(
    task: Task, state: TrainState, example: Mapping[str, Any], mesh: Mesh, most: int
) -> int:
    """The largest of `most`, `most` / 2, ... rows, a multiple of the devices, that can be scored.

    `example` is one row. Batches are compiled, not run.

    Raises:
        ConfigError: not even one row per device fits.
    """
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    free = SHARE * free_bytes(mesh.devices.flat[0])
    rows = max(most // ways, 1) * ways

    def score(state: TrainState, batch: Batch) -> Any:
        key = jax.random.key(0)
        return task.loss(state.params, state.extra, batch, key=key, train=False).metrics

    while True:
        sharding = batch_sharding(mesh, rows)
        batch = {
            name: jax.ShapeDtypeStruct((rows, *np.shape(x)), np.asarray(x).dtype, sharding=sharding)
            for name, x in example.items()
        }
        try:
            with jax.set_mesh(mesh):
                memory = jax.jit(score).lower(state, batch).compile().memory_analysis()
            if memory is None or memory.temp_size_in_bytes <= free:
                return rows
            needed = f"{memory.temp_size_in_bytes / 2**30:.2f} GiB"
        except JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            needed = "more"
        if rows == ways:
            raise ConfigError(
                f"batch: even {rows} rows need {needed} beside the parameters, {free / 2**30:.2f} "
                "GiB are free; shorten them, or use more devices"
            )
        rows = max(rows // 2 // ways, 1) * ways
