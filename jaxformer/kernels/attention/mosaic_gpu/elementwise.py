"""Elementwise programs: mods and masks traced for one score, then run on whole tiles.

Inside a Mosaic GPU kernel there is neither `jax.vjp` nor broadcasting by shape. So the functions of
`tile.py` (and of the user) are traced once outside, on arrays of one element; what remains after
dropping everything about shapes is a list of elementwise steps, which run on tiles in registers.
Each value knows over which axes of the tile it varies ("" a number, "r" rows, "c" columns, "rc"
both), so that what depends on the row alone is computed once per row.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core

from jaxformer.kernels.attention.mosaic_gpu import device

PRODUCTS = ("raw", "dw", "p")  # inputs that tensor cores compute
ONE = (1, 1, 1, 1)  # the shape with which functions of a (B, H, tq, tk) tile are traced


class Part(NamedTuple):
    """A value, and the axes of the tile over which it varies."""

    over: str
    value: Any


class Step(NamedTuple):
    """One elementwise operation; inputs are variable numbers or constants."""

    primitive: Any
    params: dict[str, Any]
    inputs: tuple[Any, ...]
    output: int


class NotElementwise(ValueError):
    """A function does something that is not elementwise, or that the machine cannot do."""


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """An elementwise function: input name -> variable, its steps, and its tree of outputs."""

    inputs: dict[str, int]
    steps: tuple[Step, ...]
    outputs: tuple[Any, ...]
    tree: Any

    def select(self, pick: Callable[[Any], Any]) -> Program:
        """The program of some of the outputs, without the steps that they do not need."""
        picked, tree = jax.tree.flatten(pick(jax.tree.unflatten(self.tree, self.outputs)))
        needed = {x for x in picked if isinstance(x, int)}
        steps = []
        for step in reversed(self.steps):
            if step.output in needed:
                steps.append(step)
                needed |= {x for x in step.inputs if isinstance(x, int)}
        inputs = {name: x for name, x in self.inputs.items() if x in needed}
        return Program(inputs, tuple(reversed(steps)), tuple(picked), tree)

    def __call__(self, shape: tuple[int, int], get: Callable[[str], Part]) -> Any:
        """The outputs as `Part`s of a (rows, columns) tile, from the inputs by name.

        Values are computed from the outputs back, each when it is first needed, so that few are
        held in registers; of two that are needed together, the one that waits for a product first.
        """
        names = {x: name for name, x in self.inputs.items()}
        sources = {step.output: step for step in self.steps}
        waiting = self._after_products()
        env: dict[int, Part] = {}

        def value(x: Any) -> Part:
            if not isinstance(x, int):
                return Part("", x.value)
            if x not in env and x in names:
                env[x] = get(names[x])
            elif x not in env:
                inputs = sources[x].inputs
                for y in sorted(inputs, key=lambda y: not (isinstance(y, int) and y in waiting)):
                    value(y)
                env[x] = _apply(sources[x], [value(y) for y in inputs], shape)
            return env[x]

        return jax.tree.unflatten(self.tree, [value(x) for x in self.outputs])

    def _after_products(self) -> set[int]:
        """The variables that depend on a product of matrices."""
        found = {x for name, x in self.inputs.items() if name in PRODUCTS}
        for step in self.steps:
            if any(isinstance(x, int) and x in found for x in step.inputs):
                found.add(step.output)
        return found


def trace(fn: Callable[[dict[str, jax.Array]], Any], inputs: Mapping[str, Any]) -> Program:
    """The program of `fn({name: array})`, where `inputs` gives types by name.

    Raises NotElementwise where `fn` is more than elementwise arithmetic.
    """
    examples = {name: jax.ShapeDtypeStruct(ONE, dtype) for name, dtype in inputs.items()}
    closed, shapes = jax.make_jaxpr(fn, return_shape=True)(examples)
    steps = _Steps()
    names = sorted(examples)  # the order in which a dict is flattened
    variables = [steps.variable() for _ in names]
    outputs = steps.inline(closed.jaxpr, closed.consts, variables)
    program = Program(
        dict(zip(names, variables, strict=True)),
        tuple(steps.steps),
        tuple(outputs),
        jax.tree.structure(shapes),
    )
    return program.select(lambda outputs: outputs)


def full_tile(part: Part, shape: tuple[int, int]) -> jax.Array:
    """A value as a whole tile."""
    return _spread(part, "rc", shape)


# ------------------------------------------------------------------------------- tracing


@dataclasses.dataclass(frozen=True)
class _Constant:
    value: Any


class _Steps:
    """Collects the steps of nested jaxprs."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.variables = 0

    def variable(self) -> int:
        self.variables += 1
        return self.variables

    def inline(self, jaxpr: Any, consts: Any, inputs: list[Any]) -> list[Any]:
        env = dict(zip(jaxpr.constvars, map(_constant, consts), strict=True))
        env |= dict(zip(jaxpr.invars, inputs, strict=True))

        def read(x: Any) -> Any:
            return _constant(x.val, x.aval.dtype) if isinstance(x, core.Literal) else env[x]

        for eqn in jaxpr.eqns:
            outputs = self.equation(eqn, [read(x) for x in eqn.invars])
            env |= dict(zip(eqn.outvars, outputs, strict=True))
        return [read(x) for x in jaxpr.outvars]

    def equation(self, eqn: Any, inputs: list[Any]) -> list[Any]:
        name = eqn.primitive.name
        if name in CALLS:
            called = eqn.params[CALLS[name]]
            consts = getattr(called, "consts", ())
            return self.inline(getattr(called, "jaxpr", called), consts, inputs)
        if math.prod(eqn.outvars[0].aval.shape) != 1:
            raise NotElementwise(f"{name} makes an array inside a tile")
        if name in SHAPES:
            return inputs[:1]
        if name in REWRITES:
            avals = [jax.ShapeDtypeStruct(ONE, x.aval.dtype) for x in eqn.invars]
            closed = jax.make_jaxpr(lambda *x: REWRITES[name](*x, **eqn.params))(*avals)
            return self.inline(closed.jaxpr, closed.consts, inputs)
        if name not in LOWERED:
            raise NotElementwise(f"{name} has no Mosaic GPU instruction")
        output = self.variable()
        primitive, params = (lax.add_p, {}) if name == "add_any" else (eqn.primitive, eqn.params)
        self.steps.append(Step(primitive, dict(params), tuple(inputs), output))
        return [output]


def _constant(x: Any, dtype: Any = None) -> _Constant:
    if isinstance(x, jax.core.Tracer):
        raise NotElementwise("a mod closes over a traced array: make it an operand in aux")
    if np.size(x) != 1:
        raise NotElementwise("a mod closes over an array: make it an operand in aux")
    return _Constant(np.asarray(x, dtype).reshape(()))


def _floor(x: jax.Array, **_: Any) -> jax.Array:
    whole = x.astype(jnp.int32).astype(x.dtype)  # truncates towards 0
    whole = whole - jnp.where(whole > x, 1.0, 0.0)
    return jnp.where(jnp.abs(x) < 2.0**23, whole, x)  # beyond, every float32 is whole


def _log1p(x: jax.Array, **_: Any) -> jax.Array:
    u = 1.0 + x  # the rounding of u cancels (Kahan)
    return jnp.where(u == 1.0, x, jnp.log(u) * x / jnp.where(u == 1.0, 1.0, u - 1.0))


def _expm1(x: jax.Array, **_: Any) -> jax.Array:
    u = jnp.exp(x)
    near = (u != 1.0) & (u > 0.5) & (u < 2.0)
    exact = (u - 1.0) * x / jnp.where(near, jnp.log(jnp.where(near, u, 2.0)), 1.0)
    return jnp.where(u == 1.0, x, jnp.where(near, exact, u - 1.0))


def _integer_pow(x: jax.Array, y: int) -> jax.Array:
    if y < 0:
        return 1.0 / _integer_pow(x, -y)
    half = _integer_pow(x, y // 2) if y > 1 else jnp.ones_like(x)
    return half * half * x if y % 2 else half * half


LOG2_E = 1 / math.log(2)
CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "checkpoint": "jaxpr",
    "remat2": "jaxpr",
}
SHAPES = (
    *("broadcast_in_dim", "reshape", "squeeze", "expand_dims", "transpose", "copy", "copy_p"),
    *("stop_gradient", "reshard"),  # `jnp.where` reshards wherever a mesh is set
    *("reduce_sum", "reduce_max", "reduce_min"),
)
REWRITES: dict[str, Callable[..., jax.Array]] = {
    "sqrt": lambda x, **_: jnp.where(x == 0.0, 0.0, x * lax.rsqrt(x)),
    "floor": _floor,
    "ceil": lambda x, **_: -_floor(-x),
    "log1p": _log1p,
    "expm1": _expm1,
    "integer_pow": _integer_pow,
    "tan": lambda x, **_: lax.sin(x) / lax.cos(x),
    # jax 0.11 has primitives of its own for these two; the first is the slope of tanh.
    "one_minus_square": lambda x, **_: 1.0 - x * x,
    "log2": lambda x, **_: jnp.log(x) * LOG2_E,
    "is_finite": lambda x, **_: jnp.abs(x) < jnp.inf,
}
LOWERED = (
    *("add", "add_any", "sub", "mul", "div", "rem", "max", "min", "neg", "abs", "sign", "clamp"),
    *("square", "rsqrt", "exp", "exp2", "log", "tanh", "logistic", "sin", "cos"),
    *("erf", "round", "select_n", "and", "or", "not", "xor", "eq", "ne", "lt", "le", "gt", "ge"),
    *("shift_left", "shift_right_logical", "shift_right_arithmetic", "convert_element_type"),
)


# ------------------------------------------------------------------------------- running


def _apply(step: Step, inputs: list[Part], shape: tuple[int, int]) -> Part:
    over = "".join(axis for axis in "rc" if any(axis in x.over for x in inputs))
    scalar_first = step.primitive is lax.select_n_p and not inputs[0].over
    values = [
        x.value if scalar_first and i == 0 else _spread(x, over, shape)
        for i, x in enumerate(inputs)
    ]
    return Part(over, step.primitive.bind(*values, **step.params))


def _spread(part: Part, over: str, shape: tuple[int, int]) -> Any:
    if part.over == over:
        return part.value
    rows, columns = shape
    target = {"r": (rows,), "c": (columns,), "rc": shape}[over]
    return device.spread(part.value, target, part.over)
