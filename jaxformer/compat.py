"""What differs between the versions of JAX that the repository runs on, 0.10.2 and 0.11.2."""

from __future__ import annotations

from typing import Any

import jax

JAX_VERSION = tuple(int(x) for x in jax.__version__.split(".")[:3])


def mosaic_gpu_load(ref: Any, layout: Any) -> jax.Array:
    """An array in registers, from shared or global memory; the layout need not be an optimal one.

    0.11 drops the index argument.
    """
    from jax.experimental.pallas import mosaic_gpu as plgpu

    index = ((),) if JAX_VERSION < (0, 11) else ()
    return plgpu.load(ref, *index, layout=layout, optimized=False)


def mosaic_gpu_transpose(ref: Any) -> Any:
    """The transposed view of a matrix in shared memory. 0.11 drops `transpose_ref`."""
    if JAX_VERSION >= (0, 11):
        return ref.transpose((1, 0))
    from jax.experimental.pallas import mosaic_gpu as plgpu

    return plgpu.transpose_ref(ref, (1, 0))
