"""Pallas kernels on a machine without their device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jax import lax
from jax.experimental import pallas as pl


def pallas(kernel: Callable[..., None], **params: Any) -> Callable[..., Any]:
    """`pl.pallas_call`, interpreted where the program is lowered for a CPU.

    The platform of the lowering decides, not the default backend: a program compiled ahead of time
    for a device that is not there gets the kernel, a test on a CPU the interpreter.
    """

    def call(*args: Any) -> Any:
        return lax.platform_dependent(
            *args,
            cpu=pl.pallas_call(kernel, interpret=True, **params),
            default=pl.pallas_call(kernel, **params),
        )

    return call
