"""DSFormer: y = W x + b with W_b = S_b D_b in every block, and what it is compared with.

Symbols of the paper: blocks of p x q, a dense basis D (r, q), a sparse S (p, r) with s values in
each row. Which of a `Method`'s parameters a state has tells what it is: before the factorisation
the kernels alone, afterwards the state `STATE` of the factoriser or other parameters.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxformer import paths
from jaxformer.compress.factored import (
    STATE,
    Factored,
    LowRank,
    StraightThrough,
    Table,
    factorise_layers,
    latent_support,
    state_of,
    with_factors,
    with_latents,
    with_low_rank,
)
from jaxformer.compress.factorize import rank_for, refit
from jaxformer.compress.factors import Factors, FactorSpec, Size, cut, size_of
from jaxformer.compress.intercepted import Intercepted
from jaxformer.errors import ConfigError
from jaxformer.recipe import Batch, Extra, LossOutput, Params, Task

METHODS = ("weight", "coef", "frozen", "svd")


@dataclasses.dataclass(frozen=True)
class Method:
    """How layers of the `table` become factors, and what of them is trained.

    "weight": the Straight-Through Factoriser on W; "coef": on S, with D exact; "frozen": the
    support is found once, then S and D are trained as they are; "svd": two thin matrices of the
    same `ratio`.

    Raises:
        ConfigError: no such method.
    """

    name: str
    table: Table
    every: int = 1
    rounds: int = 10
    ratio: float = 2.8

    def __post_init__(self) -> None:
        if self.name not in METHODS:
            raise ConfigError(f"factor.method={self.name!r}: must be one of {', '.join(METHODS)}")

    def model(self, dense: Any) -> Intercepted:
        """The dense model with its layers factorised."""
        interceptors = {
            "weight": StraightThrough(self.table, self.every),
            "coef": Factored(self.table, latent=True),
            "frozen": Factored(self.table),
            "svd": LowRank(self.table, self.ratio),
        }
        return Intercepted(dense, (interceptors[self.name],))

    def enter(
        self, params: Params, key: jax.Array, weights: Mapping[str, jax.Array] | None = None
    ) -> tuple[Params, dict[str, Any]]:
        """Parameters and the collection `STATE` of a trained dense model's parameters."""
        if self.name == "svd":
            return with_low_rank(params, self.table, self.ratio, weights), {}
        found = factorise_layers(params, self.table, key, rounds=self.rounds, weights=weights)
        if self.name == "weight":
            return params, state_of(found, counted=True)
        if self.name == "frozen":
            return with_factors(params, found), state_of(found, counted=False)
        return with_latents(params, found, self.table), {}


@dataclasses.dataclass(frozen=True)
class FactorisedTask:
    """`dense` until the layers are factorised, `factorised` from then on; both of one model."""

    dense: Task
    factorised: Task

    def init(self, key: jax.Array, batch: Batch) -> tuple[Params, Extra]:
        return self.dense.init(key, batch)

    def loss(
        self, params: Params, extra: Extra, batch: Batch, *, key: jax.Array, train: bool
    ) -> LossOutput:
        return self.of(params, extra).loss(params, extra, batch, key=key, train=train)

    def predict(self, params: Params, extra: Extra, batch: Batch, *, key: jax.Array) -> Any:
        task: Any = self.of(params, extra)
        return task.predict(params, extra, batch, key=key)

    def of(self, params: Params, extra: Extra) -> Task:
        """The one whose parameters and state these are."""
        changed = any(re.search(r"/(basis|latent|left)$", name) for name in paths.leaves(params))
        return self.factorised if changed or STATE in extra else self.dense


def exported(method: Method, params: Params, extra: Extra) -> tuple[Params, dict[str, Any]]:
    """Factors as they are stored: parameters and state of `Method("frozen", ...)`.

    Of W the values are those of least squares on its last support and basis.

    Raises:
        ConfigError: a state without factors, or thin matrices, which are stored as they are.
    """
    if method.name == "svd":
        raise ConfigError("factor.method='svd': thin matrices are stored as they are trained")
    if method.name == "frozen":
        return params, dict(extra[STATE])
    found = {}
    if method.name == "weight":
        state = paths.leaves(extra.get(STATE, {}))
        for path, (spec, w) in method.table.chosen(params).items():
            if f"{path}/basis" not in state:
                raise ConfigError(f"{path}: the state has no {STATE}; factorise it first")
            basis, indices = state[f"{path}/basis"], state[f"{path}/indices"]
            found[path] = Factors(basis, jax.vmap(refit)(cut(w, spec), basis, indices), indices)
        return with_factors(params, found), state_of(found, counted=False)
    named = dict(paths.leaves(params))
    for name in [name for name in named if name.endswith("/latent")]:
        path = name.removesuffix("/latent")
        spec = method.table.of(path)
        assert spec is not None
        latent, basis = named.pop(name), named[f"{path}/basis"]
        indices = latent_support(latent, basis, spec.nonzeros)
        values = jnp.take_along_axis(latent, indices, -1)
        named[f"{path}/values"] = values
        found[path] = Factors(basis, values, indices)
    return paths.nest(named), state_of(found, counted=False)


def accounts(params: Params, table: Table, word: int = 32) -> dict[str, Size]:
    """{path: what the layer takes} of a dense model's parameters."""
    return {
        path: size_of(spec, *w.shape, word=word) for path, (spec, w) in table.chosen(params).items()
    }


def ratios(params: Params, table: Table, ratio: float, word: int = 32) -> dict[str, float]:
    """How many times smaller the factorised layers are, and two thin matrices of that ratio."""
    shapes = [w.shape for _, w in table.chosen(params).values()]
    dense = sum(outputs * inputs for outputs, inputs in shapes) * word
    bits = sum(size.bits for size in accounts(params, table, word).values())
    thin = sum(rank_for(*shape, ratio) * sum(shape) for shape in shapes) * word
    return {"dense_sparse": dense / bits, "svd": dense / thin}


def table_of(
    columns: int, atoms: int, nonzeros: int, up_atoms: int, up_nonzeros: int, group: int | None
) -> Table:
    """A spec for the wide layers "up", and one for all others."""
    wide = FactorSpec(columns, up_atoms, up_nonzeros, group=group)
    return Table(((r"/up$", wide), (r"", FactorSpec(columns, atoms, nonzeros, group=group))))
