"""Linear layers of a model as factors: trained straight through, frozen, or as they are stored.

All are interceptions of `Einsum` with a state in the collection `STATE`. Which layers, and with
what spec, is a table of names; surgery on parameters goes by the same table.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxformer import paths
from jaxformer.compress.factorize import alternate, factorise, low_rank, rank_for, refit
from jaxformer.compress.factors import (
    Factors,
    FactorSpec,
    apply_expanded,
    apply_factors,
    cut,
    expand,
    materialise,
    paste,
    sparse,
    two_products,
)
from jaxformer.compress.matrix import PlainMap, as_matrix
from jaxformer.compress.straight_through import straight_through
from jaxformer.errors import ConfigError
from jaxformer.nn.einsum import Einsum

STATE = "factors"
LINEAR = r"(^|/)block_\d+/.*(query|key|value|out|up|down)$"  # of every block


@dataclasses.dataclass(frozen=True)
class Table:
    """Specs by the path of a layer: the first pattern that fits, of those of `layers`."""

    specs: tuple[tuple[str, FactorSpec], ...]
    layers: str = LINEAR

    def of(self, path: str) -> FactorSpec | None:
        """The spec of a layer, None if it stays dense.

        Raises:
            ConfigError: it is to be factorised, and no pattern says how.
        """
        if not re.search(self.layers, path):
            return None
        for pattern, spec in self.specs:
            if re.search(pattern, path):
                return spec
        raise ConfigError(f"{path}: is to be factorised, and no pattern of the table fits it")

    def chosen(self, params: Any) -> dict[str, tuple[FactorSpec, jax.Array]]:
        """{path of a layer: (spec, matrix (outputs, inputs))} of parameters.

        Raises:
            ConfigError: stacked layers, or a spec that does not fit its matrix.
        """
        found = {}
        for name, kernel in paths.leaves(params).items():
            path, _, leaf = name.rpartition("/")
            spec = self.of(path) if leaf == "kernel" else None
            if spec is not None:
                w = as_matrix(name, kernel)
                if w.ndim != 2:
                    raise ConfigError(f"{path}: layers are stacked; set model.scan=False")
                spec.check(*w.shape, path)
                found[path] = spec, w
        if not found:
            raise ConfigError(f"factorise: no layer fits {self.layers!r}")
        return found


def layer_of(context: Any, method: str) -> tuple[Einsum, str] | None:
    """The layer and its path, if that method of an `Einsum` is called."""
    module = context.module
    if not isinstance(module, Einsum) or context.method_name != method:
        return None
    return module, "/".join(module.path)


@dataclasses.dataclass(frozen=True)
class StraightThrough:
    """DSFormer's Straight-Through Factoriser on the weights themselves.

    The forward pass has W^ = S D of the trained W, whose gradient is that of W^, to the bit. Every
    `every` steps of training supports and basis are found anew from the last ones; between them
    values are refitted on the same support, and so they are in evaluation.
    """

    table: Table
    every: int = 1

    def __call__(self, method: Any, args: Any, kwargs: Any, context: Any) -> Any:
        found = layer_of(context, "contract")
        spec = self.table.of(found[1]) if found else None
        if found is None or spec is None:
            return method(*args, **kwargs)
        module, path = found
        x, kernel, bias = args
        plain = PlainMap(module.equation)
        w = plain.matrix(jax.lax.stop_gradient(kernel))
        spec.check(*w.shape, path)
        blocks = cut(w, spec)
        count, p, q = blocks.shape
        require_state(module, path, "basis", "indices", "count")
        state = {
            "basis": module.variable(STATE, "basis", jnp.zeros, (count, spec.atoms, q)),
            "indices": module.variable(
                STATE, "indices", jnp.zeros, (count, p, spec.nonzeros), jnp.int32
            ),
            "count": module.variable(STATE, "count", jnp.zeros, (), jnp.int32),
        }
        if module.is_initializing():
            return method(*args, **kwargs)
        basis, indices = state["basis"].value, state["indices"].value
        values = jax.vmap(refit)(blocks, basis, indices)
        factors = Factors(basis, values, indices)
        if module.is_mutable_collection(STATE):
            due = state["count"].value % self.every == 0
            factors = jax.lax.cond(due, lambda f: self._anew(blocks, f, spec), lambda f: f, factors)
            state["basis"].value, state["indices"].value = factors.basis, factors.indices
            state["count"].value = state["count"].value + 1
        found_w = plain.kernel(materialise(factors, w.shape[0]), kernel.shape)
        return method(x, straight_through(found_w, kernel), bias)

    @staticmethod
    def _anew(blocks: jax.Array, factors: Factors, spec: FactorSpec) -> Factors:
        factors = alternate(blocks, factors, spec)
        values = jax.vmap(refit)(blocks, factors.basis, factors.indices)
        return factors._replace(values=values)


@dataclasses.dataclass(frozen=True)
class Factored:
    """Layers whose parameters are factors: "basis" and "values", and no kernel.

    Their support is in the state and stays. With `latent` the parameter is a dense "latent" Z
    (blocks, p, r) instead, whose s largest |Z_ij| |D_j| of a row are S; the gradient of S goes to
    all of Z, so that supports change.
    """

    table: Table
    latent: bool = False

    def __call__(self, method: Any, args: Any, kwargs: Any, context: Any) -> Any:
        found = layer_of(context, "__call__")
        spec = self.table.of(found[1]) if found else None
        if found is None or spec is None:
            return method(*args, **kwargs)
        module, path = found
        x = PlainMap(module.equation).rows(args[0])
        outputs, inputs = math.prod(module.features), x.shape[-1]
        spec.check(outputs, inputs, path)
        p, q = spec.rows or outputs, spec.columns
        count = (outputs // p) * (inputs // q)
        normal = jax.nn.initializers.normal(0.02)
        basis = module.param("basis", normal, (count, spec.atoms, q), jnp.float32)
        if self.latent:
            z = module.param("latent", normal, (count, p, spec.atoms), jnp.float32)
            w = materialise_latent(z, basis, spec.nonzeros, outputs)
            y = x @ w.T.astype(x.dtype)
        else:
            shape = (count, p, spec.nonzeros)
            values = module.param("values", normal, shape, jnp.float32)
            ready = module.variables.get(STATE, {})
            if "expanded" in ready:
                y = apply_expanded(basis, ready["expanded"], x.astype(jnp.float32))
            elif "matrix" in ready:
                y = x.astype(jnp.float32) @ ready["matrix"].T
            else:
                require_state(module, path, "indices")
                indices = module.variable(STATE, "indices", jnp.zeros, shape, jnp.int32).value
                y = apply_factors(Factors(basis, values, indices), x.astype(jnp.float32), outputs)
            y = y.astype(x.dtype)
        return finish(module, y)


def require_state(module: Einsum, path: str, *names: str) -> None:
    """Refuse a state that lacks what a layer keeps.

    Raises:
        ConfigError: it does.
    """
    if module.is_initializing():
        return
    missing = [name for name in names if not module.has_variable(STATE, name)]
    if missing:
        raise ConfigError(
            f"{path}: the state has no {STATE}/{missing[0]}; enter the phase that factorises, or "
            "restore a checkpoint of it"
        )


def finish(module: Einsum, y: jax.Array) -> jax.Array:
    """Outputs (..., outputs) with the layer's bias, in the layer's shape."""
    if module.use_bias:
        bias = module.param("bias", module.bias_init, module.features, jnp.float32)
        y = y + bias.reshape(-1).astype(y.dtype)
    return y.reshape(*y.shape[:-1], *module.features)


def materialise_latent(z: jax.Array, basis: jax.Array, nonzeros: int, outputs: int) -> jax.Array:
    """W (outputs, inputs) of a dense latent: forward its largest entries, backward all."""
    weight = jnp.abs(z) * jnp.linalg.norm(basis, axis=-1)[:, None, :]
    _, indices = jax.lax.top_k(jax.lax.stop_gradient(weight), nonzeros)
    kept = (indices[..., None] == jnp.arange(z.shape[-1])).any(-2)
    s = straight_through(jnp.where(kept, z, 0.0), z)
    return paste(jnp.einsum("bpr,brq->bpq", s, basis), outputs)


def latent_support(z: jax.Array, basis: jax.Array, nonzeros: int) -> jax.Array:
    """The indices (blocks, p, s) that a latent keeps."""
    weight = jnp.abs(z) * jnp.linalg.norm(basis, axis=-1)[:, None, :]
    return jax.lax.top_k(weight, nonzeros)[1]


# ---------------------------------------------------------------------------------------- surgery


def factorise_layers(
    params: Any,
    table: Table,
    key: jax.Array,
    *,
    rounds: int = 10,
    weights: Mapping[str, jax.Array] | None = None,
) -> dict[str, Factors]:
    """{path: factors} of every layer of the table; `weights` {path: (outputs,)} if rows differ.

    Layers of one shape are a loop, so that a program compiles one of them.
    """
    alike: dict[Any, list[str]] = {}
    layers = table.chosen(params)
    for path, (spec, w) in layers.items():
        alike.setdefault((spec, w.shape), []).append(path)
    found: dict[str, Factors] = {}
    for i, ((spec, shape), names) in enumerate(alike.items()):
        w = jnp.stack([layers[path][1] for path in names])
        keys = jax.random.split(jax.random.fold_in(key, i), len(names))
        rows = jnp.ones((len(names), shape[0]))
        if weights is not None:
            rows = jnp.stack([weights[path] for path in names])

        many = _factorise_alike(w, keys, rows, spec, rounds)
        found |= {path: Factors(*(x[j] for x in many)) for j, path in enumerate(names)}
    return {path: found[path] for path in layers}


@functools.partial(jax.jit, static_argnames=("spec", "rounds"))
def _factorise_alike(
    w: jax.Array, keys: jax.Array, weight: jax.Array, spec: FactorSpec, rounds: int
) -> Factors:
    def one(layer: tuple[jax.Array, ...]) -> Factors:
        w, key, weight = layer
        return factorise(w, spec, key=key, rounds=rounds, weight=weight)

    return jax.lax.map(one, (w, keys, weight))


def prepared_state(params: Any, state: Any, table: Table) -> dict[str, Any]:
    """The collection `STATE` for many answers: S expanded, or W itself, in place of indices."""
    named, parts = dict(paths.leaves(state)), paths.leaves(params)
    for name in [name for name in named if name.endswith("/indices")]:
        path = name.removesuffix("/indices")
        factors = Factors(parts[f"{path}/basis"], parts[f"{path}/values"], named[name])
        spec = table.of(path)
        if spec is not None and spec.rows is None:  # else it is not known how blocks are placed
            outputs = factors.values.shape[1]
            del named[name]
            if two_products(factors):
                named[f"{path}/expanded"] = expand(factors, outputs)
            else:
                named[f"{path}/matrix"] = materialise(factors, outputs)
    return paths.nest(named)


def state_of(factors: Mapping[str, Factors], *, counted: bool) -> dict[str, Any]:
    """The collection `STATE` of layers: with the basis and a counter where W is what is trained."""
    named: dict[str, Any] = {}
    for path, found in factors.items():
        named[f"{path}/indices"] = found.indices
        if counted:
            named |= {f"{path}/basis": found.basis, f"{path}/count": jnp.zeros((), jnp.int32)}
    return paths.nest(named)


def with_factors(params: Any, factors: Mapping[str, Factors]) -> Any:
    """Parameters with "basis" and "values" in place of the kernels of those layers."""
    named = dict(paths.leaves(params))
    for path, found in factors.items():
        del named[f"{path}/kernel"]
        named |= {f"{path}/basis": found.basis, f"{path}/values": found.values}
    return paths.nest(named)


def with_latents(params: Any, factors: Mapping[str, Factors], table: Table) -> Any:
    """Parameters with "basis" and "latent" in place of kernels.

    On its support a latent has the values of S, elsewhere what the rest of a row has in common
    with the basis, made small enough not to be chosen.
    """
    named, layers = dict(paths.leaves(params)), table.chosen(params)
    for path, found in factors.items():
        spec, w = layers[path]
        blocks = cut(w, spec)
        on = jax.vmap(lambda v, i, r=spec.atoms: sparse(v, i, r))(found.values, found.indices)
        rest = blocks - jnp.einsum("bpr,brq->bpq", on, found.basis)
        square = jnp.square(found.basis).sum(-1)[:, None, :]
        off = jnp.einsum("bpq,brq->bpr", rest, found.basis) / jnp.maximum(square, 1e-12)
        size = jnp.linalg.norm(found.basis, axis=-1)[:, None, :]
        least = jnp.where(on != 0, jnp.abs(on) * size, jnp.inf).min(-1, keepdims=True)
        limit = 0.99 * least / jnp.maximum(size, 1e-12)
        latent = jnp.where(on != 0, on, jnp.clip(off, -limit, limit))
        del named[f"{path}/kernel"]
        named |= {f"{path}/basis": found.basis, f"{path}/latent": latent}
    return paths.nest(named)


def with_low_rank(
    params: Any, table: Table, ratio: float, weights: Mapping[str, jax.Array] | None = None
) -> Any:
    """Parameters with "left" (outputs, rank) and "right" (rank, inputs) in place of kernels."""
    named = dict(paths.leaves(params))
    for path, (_, w) in table.chosen(params).items():
        rank = rank_for(*w.shape, ratio)
        left, right = low_rank(w, rank, None if weights is None else weights[path])
        del named[f"{path}/kernel"]
        named |= {f"{path}/left": left, f"{path}/right": right}
    return paths.nest(named)


@dataclasses.dataclass(frozen=True)
class LowRank:
    """Layers as two thin matrices, "left" and "right", so many times smaller than one."""

    table: Table
    ratio: float

    def __call__(self, method: Any, args: Any, kwargs: Any, context: Any) -> Any:
        found = layer_of(context, "__call__")
        if found is None or self.table.of(found[1]) is None:
            return method(*args, **kwargs)
        module, _ = found
        x = PlainMap(module.equation).rows(args[0])
        outputs, inputs = math.prod(module.features), x.shape[-1]
        rank = rank_for(outputs, inputs, self.ratio)
        normal = jax.nn.initializers.normal(0.02)
        left = module.param("left", normal, (outputs, rank), jnp.float32)
        right = module.param("right", normal, (rank, inputs), jnp.float32)
        y = (x @ right.T.astype(x.dtype)) @ left.T.astype(x.dtype)
        return finish(module, y)
