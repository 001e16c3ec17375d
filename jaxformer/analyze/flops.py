"""FLOPs of a program, counted on its jaxpr.

XLA's own cost analysis counts the body of a scan once and a custom kernel not at all (measured),
so it is not used.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core

from jaxformer.kernels.target import on_paper


def count(function: Callable[..., Any], *args: Any) -> int:
    """Multiply-adds x 2 of all matrix products and convolutions in `function(*args)`.

    `args` may be `jax.ShapeDtypeStruct`s. A `while` loop counts once, since its length is not
    known, and a `cond` as its dearest branch. Attention counts the scores that its mask leaves,
    whatever runs it, and twice as much again in a backward pass: recomputation is not counted.
    """
    # Where arrays lie does not matter, and on paper there is no mesh for them.
    bare = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), args)
    with on_paper():
        return _jaxpr(jax.make_jaxpr(function)(*bare).jaxpr)


def _jaxpr(jaxpr: Any) -> int:
    return sum(_equation(equation) for equation in jaxpr.eqns)


def _equation(equation: Any) -> int:
    name = equation.primitive.name
    shapes = [v.aval.shape for v in equation.invars if hasattr(v.aval, "shape")]
    if name == "dot_general":
        (contracted, _), _ = equation.params["dimension_numbers"]
        size = math.prod(equation.outvars[0].aval.shape)
        return 2 * size * math.prod(shapes[0][axis] for axis in contracted)
    if name == "conv_general_dilated":
        kernel = shapes[1]
        outputs = kernel[equation.params["dimension_numbers"].rhs_spec[0]]
        return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(kernel) // outputs
    inner = [_jaxpr(body) for body in _bodies(equation.params)]
    if name == "cond":
        return max(inner, default=0)
    return sum(inner) * (equation.params["length"] if name == "scan" else 1)


def _bodies(params: dict[str, Any]) -> list[Any]:
    found = []
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, core.ClosedJaxpr):
                found.append(item.jaxpr)
            elif isinstance(item, core.Jaxpr):
                found.append(item)
    return found
