"""BiViT: vision transformers whose weights and attention are of one bit.

Softmax-aware binarisation (section 3.2) makes a mask of each row of attention by a threshold that
follows the row's largest probability. Cross-layer binarisation (section 3.3) makes attention binary
first, the MLP afterwards. Parameterised weight scales (section 3.4) are learned, one per output
channel. All of it is interception of a plain model, whose parameters stay what they are.

Symbols of the paper: P scores, A = softmax(P), T the threshold of a row, b its mask, v its scale.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxformer.compress.binary import BinaryEinsum, BinaryOperands
from jaxformer.compress.intercepted import Intercepted
from jaxformer.compress.straight_through import straight_through
from jaxformer.errors import ConfigError
from jaxformer.models.transformer import require
from jaxformer.nn.attention import Fused, Softmax, Unfused
from jaxformer.nn.interception import fits
from jaxformer.nn.make import swap

ATTENTION = r"(^|/)mixer/"  # the modules of attention, windowed or not
ATTENTION_MAPS = r"(^|/)mixer/(query|key|value|out)$"
MLP_MAPS = r"(^|/)mlp/(up|down)$"
ROUNDS = 5

# ------------------------------------------------------------------- a row of attention as v b


def row_scale(a: jax.Array, b: jax.Array) -> jax.Array:
    """V (..., 1) for which v b is nearest to the rows a (..., S): (a . b) / (b . b)."""
    return (a * b).sum(-1, keepdims=True) / b.sum(-1, keepdims=True)


def optimal_row_binarisation(a: jax.Array, rounds: int = ROUNDS) -> tuple[jax.Array, jax.Array]:
    """(v (..., 1), b (..., S)) with v b near rows a of probabilities, b in {0, 1}.

    v and b are in turn the best for one another, `rounds` times, from b of ones: b = [a >= v / 2].
    """
    b = jnp.ones_like(a)
    for _ in range(rounds):
        b = (a >= row_scale(a, b) / 2).astype(a.dtype)
    return row_scale(a, b), b


# ----------------------------------------------------------- what becomes of the rows of scores


@dataclasses.dataclass(frozen=True)
class SoftmaxAware:
    """SAB: 1 where A >= T = beta max(A) of its row; the gradient goes through the softmax.

    beta = 1/4 is a shift; it is the slope of the optimal threshold over max(A) on ImageNet.
    """

    beta: float = 0.25

    def __post_init__(self) -> None:
        if not 0.0 < self.beta <= 1.0:
            raise ConfigError(f"model.beta={self.beta}: must be in (0, 1]")

    def __call__(self, p: jax.Array, a: jax.Array) -> jax.Array:
        del p
        mask = a >= self.beta * a.max(-1, keepdims=True)
        return straight_through(mask.astype(a.dtype), a)


@dataclasses.dataclass(frozen=True)
class OptimalRows:
    """The optimal v b, scale and all, in place of the mask; its gradient is SAB's."""

    def __call__(self, p: jax.Array, a: jax.Array) -> jax.Array:
        del p
        v, b = optimal_row_binarisation(a)
        return straight_through(v * b, a)


@dataclasses.dataclass(frozen=True)
class PositiveScores:
    """BiBERT's, the baseline: 1 where P > 0, whose gradient passes where -1 < P < 1."""

    def __call__(self, p: jax.Array, a: jax.Array) -> jax.Array:
        clipped = jnp.where(jnp.abs(p) < 1, p, jax.lax.stop_gradient(p))
        return straight_through((p > 0).astype(a.dtype), clipped)


Rows = Callable[[jax.Array, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class BinaryRows:
    """An interceptor: `rows`(P, A) in place of A, in attention that fits `pattern`.

    What a row does not see is 0 in it, and no part of its maximum.
    """

    rows: Rows
    pattern: str = ATTENTION

    def __call__(
        self,
        method: Callable[..., Any],
        args: Any,
        kwargs: Any,
        context: nn.module.InterceptorContext,
    ) -> Any:
        part = context.module
        a_BxHxLxS = method(*args, **kwargs)
        if not isinstance(part, Softmax) or context.method_name != "__call__":
            return a_BxHxLxS
        if not fits(self.pattern, part):
            return a_BxHxLxS
        p_BxHxLxS, visible = args
        return jnp.where(visible, self.rows(p_BxHxLxS, a_BxHxLxS), 0.0)


# ------------------------------------------------------------------------------- binary models

SCALES = ("learned", "mean")


def rows_of(name: str, beta: float = 0.25) -> Rows:
    """The rule of rows that a config names.

    Raises:
        ConfigError: there is none of that name, or beta is outside (0, 1].
    """
    rules = {
        "sab": lambda: SoftmaxAware(beta),
        "optimal": OptimalRows,
        "positive": PositiveScores,
    }
    require("model.attention", name, rules)
    return rules[name]()


def binary_attention(model: Any, rows: Rows, *, learned: bool = True) -> Intercepted:
    """`model` with binary attention: maps and their inputs, queries, keys, values and rows."""
    return Intercepted(
        swap(model, Fused, Unfused),
        (
            BinaryEinsum(ATTENTION_MAPS, learned=learned),
            BinaryOperands(ATTENTION),
            BinaryRows(rows),
        ),
    )


def binary_mlp(model: Intercepted, *, binary_inputs: bool, learned: bool = True) -> Intercepted:
    """`model` with binary weights in its MLPs too, and binary inputs ("1/1") or not ("1/32")."""
    maps = BinaryEinsum(MLP_MAPS, binary_inputs, learned)
    return Intercepted(model.model, (*model.interceptors, maps))
