"""The hardware that a program is traced for: what every dispatch asks first.

Inside a mesh it is the mesh's, which may be a topology that is not here (ahead-of-time
compilation); otherwise this process's default device.
"""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import jax
from jax.sharding import AbstractDevice, AbstractMesh

HOPPER = ("H100", "H200", "H800", "H20", "GH200")


class Target(NamedTuple):
    """A platform ("cpu", "gpu" for NVIDIA, "tpu", ...) and the vendor's name of the device."""

    platform: str
    kind: str

    @property
    def hopper(self) -> bool:
        """Compute capability 9.0: what Mosaic GPU kernels are written for."""
        return self.platform == "gpu" and any(name in self.kind for name in HOPPER)

    def __str__(self) -> str:
        return self.kind if self.kind != self.platform else self.platform


def target() -> Target:
    """Where the program being traced will run."""
    device = jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]
    platform = "gpu" if device.platform in ("gpu", "cuda") else device.platform
    return Target(platform, device.device_kind)


def on_paper() -> contextlib.AbstractContextManager[None]:
    """Trace for nothing that runs: operations become the products they need, to be counted."""
    device = AbstractDevice("paper", None, "paper")
    return jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("data",), abstract_device=device))
