"""Mods in the instructions that Triton has: JAX's lowering to it knows no rounding."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from jaxformer.kernels.attention.mods import ProbMod
from jaxformer.kernels.attention.operands import Idx
from jaxformer.kernels.attention.request import Request, Rules

MISSING = {"erf", "erfc", "lgamma", "digamma", "bessel_i0e", "bessel_i1e", "custom_vjp_call"}


def lowered_rules(rules: Rules) -> Rules:
    """The rules of a call with mods that can be lowered."""
    score, prob = rules.score_mod, rules.prob_mod
    return dataclasses.replace(
        rules,
        score_mod=None if score is None else lowered(score),
        prob_mod=None if prob is None else ProbMod(lowered(prob.fn), prob.linear),
    )


def refused(request: Request) -> set[str]:
    """Names of what the mods of a call do that cannot be lowered."""
    number = jax.ShapeDtypeStruct((1, 1), jnp.float32)
    idx = Idx(*[jax.ShapeDtypeStruct((1, 1), jnp.int32)] * 4)
    aux = {
        name: jax.ShapeDtypeStruct((1, 1), number.dtype if x.differentiable else x.value.dtype)
        for name, x in request.aux.items()
    }
    score, prob = request.rules.score_mod, request.rules.prob_mod
    mods = [x for x in (score, prob and prob.fn) if x is not None]
    return set().union(*(_missing(jax.make_jaxpr(x)(number, idx, aux).jaxpr) for x in mods))


def lowered(mod: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """The same function, `round` (half to even) written with `floor`."""

    def run(*args: Any) -> jax.Array:
        closed = jax.make_jaxpr(mod)(*args)
        return _evaluate(closed.jaxpr, closed.consts, jax.tree.leaves(args))[0]

    return run


def _missing(jaxpr: Any) -> set[str]:
    names: set[str] = set()
    for eqn in jaxpr.eqns:
        inner = [x for x in map(_jaxpr, eqn.params.values()) if x is not None]
        names |= {eqn.primitive.name} & MISSING | set().union(*map(_missing, inner))
    return names


def _jaxpr(x: Any) -> Any:
    return getattr(x, "jaxpr", x) if isinstance(x, (core.Jaxpr, core.ClosedJaxpr)) else None


def _evaluate(jaxpr: Any, consts: Any, args: Any) -> list[Any]:
    env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))
    for eqn in jaxpr.eqns:
        inputs = [x.val if isinstance(x, core.Literal) else env[x] for x in eqn.invars]
        if eqn.primitive.name in ("jit", "pjit"):
            inner = eqn.params["jaxpr"]
            outputs = _evaluate(inner.jaxpr, inner.consts, inputs)
        elif eqn.primitive.name == "round":
            outputs = [_round_half_to_even(*inputs)]
        else:
            params = eqn.primitive.get_bind_params(eqn.params)
            outputs = eqn.primitive.bind(*inputs, **params)
            outputs = outputs if eqn.primitive.multiple_results else [outputs]
        env |= dict(zip(eqn.outvars, outputs, strict=True))
    return [x.val if isinstance(x, core.Literal) else env[x] for x in jaxpr.outvars]


def _round_half_to_even(x: jax.Array) -> jax.Array:
    """Exact for every float: `x - floor(x)` is."""
    below = jnp.floor(x)
    rest = x - below
    odd = below - 2.0 * jnp.floor(0.5 * below)
    up = jnp.where(rest == 0.5, odd, jnp.where(rest > 0.5, 1.0, 0.0))
    return below + up
