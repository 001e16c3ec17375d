"""Meshes. This is the only file that makes one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import jax
from jax.experimental.mesh_utils import create_hybrid_device_mesh
from jax.sharding import AbstractMesh, AxisType, Mesh

from jaxformer.recipe import ConfigError

# Every mesh has all axes, most of size 1, so that a rule may name any of them.
AXES = ("data", "fsdp", "sequence", "tensor", "expert")


def axis_sizes(sizes: Mapping[str, int], devices: int) -> tuple[int, ...]:
    """Sizes of all `AXES` for `devices` devices; one axis may be -1, which takes what is left.

    Raises:
        ConfigError: unknown axis, or sizes whose product is not the number of devices.
    """
    unknown = sorted(set(sizes) - set(AXES))
    if unknown:
        raise ConfigError(f"mesh.{unknown[0]}: unknown axis; allowed: {', '.join(AXES)}")
    full = {axis: int(sizes.get(axis, 1)) for axis in AXES}
    free = [axis for axis, size in full.items() if size == -1]
    fixed = math.prod(size for size in full.values() if size != -1)
    if len(free) > 1 or fixed < 1 or any(size == 0 or size < -1 for size in full.values()):
        raise ConfigError(
            f"mesh: sizes must be positive, at most one of them -1; got {dict(sizes)}"
        )
    if free and devices % fixed == 0:
        full[free[0]] = devices // fixed
    if math.prod(full.values()) != devices:
        raise ConfigError(
            f"mesh: {dict(sizes)} does not cover {devices} devices; "
            "set one axis to -1 or make the product of the sizes equal to the device count"
        )
    return tuple(full.values())


def make_mesh(
    sizes: Mapping[str, int] | None = None, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """A mesh over `devices` (all by default); data-parallel when `sizes` is empty.

    Of devices in several slices the data axis has two levels: the slices, and within each what is
    left, so that no other axis crosses the slow network between them. Axes are Auto:
    `jax.make_mesh` would make them Explicit, which Linen layers do not run on.
    """
    devices = jax.devices() if devices is None else list(devices)
    shape = axis_sizes(sizes or {"data": -1}, len(devices))
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices > 1:
        return _over_slices(shape, slices, devices)
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def _over_slices(shape: Sequence[int], slices: int, devices: Sequence[jax.Device]) -> Mesh:
    if shape[0] % slices:
        raise ConfigError(
            f"mesh.data: {shape[0]} copies cannot be shared by {slices} slices; use a multiple"
        )
    within = (shape[0] // slices, *shape[1:])
    between = (slices, *(1 for _ in shape[1:]))
    grid = create_hybrid_device_mesh(within, between, devices)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def abstract_mesh(sizes: Mapping[str, int]) -> AbstractMesh:
    """A mesh of devices that are not here, to lower programs for them."""
    shape = axis_sizes(sizes, math.prod(sizes.values()))
    return AbstractMesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES))
