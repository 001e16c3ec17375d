"""Hardware by name: what a chip holds and how fast it is, and pods of them that are not here.

`topology("v5e:16x16").devices()` are devices to compile for, on any machine. TPUs need libtpu
(the extra plan-tpu), GPUs the CUDA plugin (plan-cuda); neither needs a device.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from pathlib import Path

import jax

from jaxformer.errors import ConfigError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device by its vendor's figures: bytes, dense bfloat16 FLOP/s, bytes/s.

    `link` is what one device can send to its neighbours at a time: all ICI links of a TPU, NVLink
    of a GPU. `between` is its share of the network between slices or hosts.
    """

    platform: str  # tpu | cuda
    memory: float
    flops: float
    bandwidth: float
    link: float
    between: float


CHIPS = {
    "v4": Chip("tpu", 32 * GIB, 275e12, 1.2e12, 300e9, 3.1e9),
    "v5e": Chip("tpu", 16 * GIB, 197e12, 0.82e12, 200e9, 3.1e9),
    "v5p": Chip("tpu", 95 * GIB, 459e12, 2.77e12, 600e9, 6.2e9),
    "v6e": Chip("tpu", 32 * GIB, 918e12, 1.64e12, 448e9, 6.2e9),
    "a100": Chip("cuda", 80e9, 312e12, 2.0e12, 300e9, 25e9),
    "h100": Chip("cuda", 80e9, 989e12, 3.35e12, 450e9, 50e9),
    "h200": Chip("cuda", 141e9, 989e12, 4.8e12, 450e9, 50e9),
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """`slices` copies of a chip in a grid: a torus of TPUs, hosts x GPUs."""

    name: str
    chip: Chip
    grid: tuple[int, ...]
    slices: int = 1

    @property
    def size(self) -> int:
        """Devices altogether."""
        return math.prod(self.grid) * self.slices

    def devices(self) -> list[jax.Device]:
        """Devices to compile for.

        Raises:
            ConfigError: the compiler for them is not installed, or it knows no such grid.
        """
        from jax.experimental import topologies

        kind = self.name.rpartition("*")[2].partition(":")[0]
        grid = "x".join(map(str, self.grid))
        try:
            if self.chip.platform == "tpu":
                os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # no metadata server to ask
                os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # nothing runs on a chip
                found = topologies.get_topology_desc(
                    platform="tpu", topology_name=f"{kind}:{grid}", num_slices=self.slices
                )
            else:
                # h100 differs from h200 in its memory alone, which the compiler is not asked for.
                file = "a100" if kind == "a100" else "h200"
                config = (Path(__file__).parent / "targets" / f"{file}.txtpb").read_text()
                found = topologies.get_topology_desc(
                    platform="cuda",
                    topology_name=kind,
                    target_config=config,
                    topology=f"{self.slices}x{grid}",
                )
        except Exception as error:  # the plugins raise whatever they like
            extra = f"plan-{self.chip.platform}"
            raise ConfigError(
                f"topology: {self.name!r} cannot be compiled for "
                f"({str(error).strip().splitlines()[0]}); install jaxformer[{extra}] and give a "
                "grid that exists"
            ) from error
        return list(found.devices)


def topology(name: str) -> Topology:
    """The topology called "v5p:8x8x16", "h200:8x8" (hosts x GPUs) or "2*v5p:8x8x8" (two slices).

    Raises:
        ConfigError: no such chip, or not a grid.
    """
    found = re.fullmatch(r"(?:(\d+)\*)?(\w+):(\d+(?:x\d+)*)", name)
    if found is None or found[2] not in CHIPS:
        raise ConfigError(
            f"topology: {name!r} is unknown; give CHIP:GRID, such as v5e:16x16, v5p:8x8x16, "
            f"h200:8x8 (hosts x GPUs) or 2*v5p:8x8x8 (slices), with one of {', '.join(CHIPS)}"
        )
    grid = tuple(int(n) for n in found[3].split("x"))
    chip = CHIPS[found[2]]
    dimensions = (2, 3) if chip.platform == "tpu" else (2, 2)
    slices = int(found[1] or 1)
    if not dimensions[0] <= len(grid) <= dimensions[1] or 0 in (*grid, slices):
        raise ConfigError(f"topology: {name!r}: {found[2]} needs a grid like that of v5e:16x16")
    return Topology(name, chip, grid, slices)
