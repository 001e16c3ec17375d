"""The machine as the kernels see it: every operation that only a GPU has, and none besides.

A kernel runs once per grid position, in warpgroups of 128 threads that share memory and meet at
barriers. Values are whole tiles, spread over the registers of a warpgroup: "rc" is a matrix, "r"
one number per row of it, "c" one per column, "" a single number. The tests replace this module
by a simulator, so that schedules, barriers and arithmetic are checked where there is no GPU.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxformer import compat

F32 = jnp.float32


@dataclasses.dataclass(frozen=True)
class Shared:
    """A buffer in shared memory; its last two axes are swizzled in the way of the tensor cores.

    `swizzle` is the bytes of a swizzled row. Both factors of a product have the same one, and the
    product sums over whole ones: 64 for tiles of 32 columns of 16-bit numbers.
    """

    shape: tuple[int, ...]
    dtype: Any
    swizzle: int = 128

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * jnp.dtype(self.dtype).itemsize


@dataclasses.dataclass(frozen=True)
class Barriers:
    """A row of barriers, each complete after `arrivals` warpgroups arrived or its bytes did."""

    number: int
    arrivals: int = 1


def launch(
    body: Callable[[Mapping[str, Any]], None],
    inputs: Mapping[str, jax.Array],
    outputs: Mapping[str, jax.ShapeDtypeStruct],
    scratch: Mapping[str, Shared | Barriers],
    *,
    name: str,
    grid: Mapping[str, int],
    warpgroups: int,
) -> dict[str, jax.Array]:
    """Run `body(references by name)` at every grid position; the last grid axis runs fastest."""
    names = (*inputs, *outputs, *scratch)

    def kernel(*refs: Any) -> None:
        body(dict(zip(names, refs, strict=True)))

    kernel.__name__ = name
    call = plgpu.kernel(
        kernel,
        out_type=tuple(outputs.values()),
        scratch_types=[_allocation(x) for x in scratch.values()],
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        num_threads=warpgroups,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )
    return dict(zip(outputs, call(*inputs.values()), strict=True))


def _allocation(x: Shared | Barriers) -> Any:
    if isinstance(x, Barriers):
        return plgpu.Barrier(num_arrivals=x.arrivals, num_barriers=x.number)
    columns = x.swizzle // jnp.dtype(x.dtype).itemsize
    transforms = plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(x.swizzle)
    return plgpu.SMEM(x.shape, x.dtype, transforms=transforms)


# -------------------------------------------------------------------------------- control


def index(axis: str) -> jax.Array:
    """The position on a grid axis, or the number of the "warpgroup"."""
    return lax.axis_index(axis)


def when(condition: Any) -> Callable[[Callable[[], None]], None]:
    """Decorate what runs only if the condition holds."""
    return pl.when(condition)


def loop(start: Any, stop: Any, body: Callable[[Any, Any], Any], carry: Any) -> Any:
    """Carry = body(t, carry) for t in [start, stop), int32."""
    return lax.fori_loop(jnp.int32(start), jnp.int32(stop), body, carry)


def opaque(x: jax.Array) -> jax.Array:
    """The same number, of which the compiler knows nothing.

    It would compute the addresses of all operands of a product before the loop, and spill them: at
    head size 256 the dQ kernel stored 372 bytes per thread, with this none.
    """
    return lax.optimization_barrier(x)


def registers(number: int, *, more: bool) -> None:
    """Give the warpgroup another share of the registers, 64 K per streaming multiprocessor."""
    plgpu.set_max_registers(number, action="increase" if more else "decrease")


# --------------------------------------------------------------------------- asynchronous


def fetch(source: Any, target: Any, barrier: Any) -> None:
    """Copy a block of global memory to shared memory; out of bounds reads 0."""
    plgpu.copy_gmem_to_smem(source, target, barrier)


def put(value: jax.Array, staging: Any, target: Any) -> None:
    """Store a tile in global memory by way of shared memory; what is out of bounds is dropped."""
    staging[...] = value.astype(staging.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(staging, target)


def keep(value: jax.Array, target: Any) -> None:
    """Store a tile in shared memory, where the next products of this warpgroup find it."""
    target[...] = value.astype(target.dtype)
    plgpu.commit_smem()


def finish_puts() -> None:
    """Wait until global memory has what was `put`."""
    plgpu.wait_smem_to_gmem(0)


def arrive(barrier: Any) -> None:
    """Count this warpgroup at the barrier."""
    plgpu.barrier_arrive(barrier)


def wait(barrier: Any) -> None:
    """Wait for the barrier's next completion; a warpgroup waits for each of them or for none."""
    plgpu.barrier_wait(barrier)


# ----------------------------------------------------------------------------- products


def transposed(ref: Any) -> Any:
    """The transposed view of a matrix in shared memory."""
    return compat.mosaic_gpu_transpose(ref)


def multiply(a: Any, b: Any, then: Callable[[], None] | None = None) -> jax.Array:
    """The product a @ b in float32, both in shared memory; `then` runs while it is computed."""

    def body(total: Any) -> jax.Array:
        plgpu.wgmma(total, a, b)
        if then is not None:
            then()
        return total[...]

    return pl.run_scoped(body, plgpu.ACC((a.shape[0], b.shape[1]), F32))


def add_products(*terms: tuple[jax.Array, Any, Any]) -> tuple[jax.Array, ...]:
    """Total + a @ b for each (total, a, b): b in shared memory, a there or in registers."""

    def body(sums: Any) -> None:
        for total, (_, a, b) in zip(sums, terms, strict=True):
            plgpu.wgmma(total, a.astype(b.dtype) if isinstance(a, jax.Array) else a, b)

    return tuple(pl.run_state(body)(tuple(plgpu.ACC.init(total) for total, _, _ in terms)))


# ------------------------------------------------------------------------------- values


def _layout(over: str) -> Any:
    wgmma = plgpu.Layout.WGMMA
    return {"rc": wgmma, "r": wgmma.reduce(1), "c": wgmma.reduce(0)}[over]


def load(ref: Any, over: str) -> jax.Array:
    """A block of global memory as a tile."""
    return compat.mosaic_gpu_load(ref, _layout(over))


def full(shape: tuple[int, ...], value: float, over: str) -> jax.Array:
    """A tile of one float32 number."""
    return plgpu.layout_cast(jnp.full(shape, value, F32), _layout(over))


def count(n: int, over: str) -> jax.Array:
    """0, 1, ..., n - 1 along the rows or the columns of a tile, int32."""
    return plgpu.broadcasted_iota(jnp.int32, (n,), 0, layout=_layout(over))


def spread(x: jax.Array, shape: tuple[int, ...], over: str) -> jax.Array:
    """A value that varies over fewer axes ("", "r", "c") as a tile."""
    return lax.broadcast_in_dim(x, shape, {"r": (0,), "c": (1,), "": ()}[over])
