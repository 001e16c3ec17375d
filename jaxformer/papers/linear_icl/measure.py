"""How a layer is judged: against the limit that the theory gives, and against ridge regression."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp

from jaxformer.papers.linear_icl import model
from jaxformer.recipe import EvalContext, Params, TrainState

Array = jax.Array


def against_limit(params: Params, task: model.PopulationRegression) -> dict[str, Array]:
    """How far `params` are from the limit of gradient flow.

    "excess_loss" is L / L_min - 1, exact; "error" the relative Frobenius error of u U, "cosine"
    its cosine with that of the limit, "balance" (u^2 - ||U||_F^2) / u^2, which the flow keeps;
    "outside" the norm of w21 of both matrices, through which x_q would enter beyond first order.
    """
    end = task.limit()
    (U, u, rest), (U_end, u_end, _) = model.blocks(params), model.blocks(end)
    product, wanted = u * U, u_end * U_end
    norm = jnp.linalg.norm
    return {
        "excess_loss": task.population(params) / task.population(end) - 1,
        "error": norm(product - wanted) / norm(wanted),
        "cosine": jnp.vdot(product, wanted) / (norm(product) * norm(wanted)),
        "balance": (u**2 - norm(U) ** 2) / u**2,
        "outside": rest,
    }


@dataclasses.dataclass(frozen=True)
class AgainstLimit:
    """`against_limit` as an evaluator."""

    task: model.PopulationRegression
    every: int | Literal["phase_end", "end"] = "end"
    name: str = "limit"

    def __call__(self, state: TrainState, context: EvalContext) -> Mapping[str, float]:
        del context
        found = jax.jit(lambda params: against_limit(params, self.task))(state.params)
        return {name: float(value) for name, value in found.items()}


def ridge(x: Array, y: Array, x_q: Array, penalty: float = 1e-6) -> Array:
    """The answer (B,) of ridge regression on the prompt, by default all but least squares."""
    d = x.shape[-1]
    moment = jnp.einsum("bni,bn->bi", x, y)
    w = jnp.linalg.solve(x.mT @ x + penalty * jnp.eye(d), moment[..., None])[..., 0]
    return jnp.einsum("bi,bi->b", x_q, w)
