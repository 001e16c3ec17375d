"""One attention call as a value: what every implementation receives."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jaxformer.kernels.attention.masks import Mask, TileState
from jaxformer.kernels.attention.mods import ProbMod, ScoreMod
from jaxformer.kernels.attention.operands import Operand, Sizes


@dataclasses.dataclass(frozen=True)
class Rules:
    """The static part of a call."""

    scale: float
    score_mod: ScoreMod | None = None
    prob_mod: ProbMod | None = None
    dropout_rate: float = 0.0
    head_map: tuple[int, ...] | None = None
    tiles: tuple[int, int] | None = None
    allow_quadratic: bool = False

    @property
    def two_pass(self) -> bool:
        """Whether the normaliser must be known before the weights are."""
        return self.prob_mod is not None and not self.prob_mod.linear


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Request:
    """A checked call: arrays as the caller gave them, batch-major, and the rules.

    q (B, L, H, K), k (B, S, G, K), v (B, S, G, Kv), sink (H,), q_pos (L,) or (B, L), k_pos alike,
    seed a uint32 scalar.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    mask: Mask
    aux: dict[str, Operand]
    sink: jax.Array | None
    q_pos: jax.Array | None
    k_pos: jax.Array | None
    seed: jax.Array | None
    rules: Rules = dataclasses.field(metadata={"static": True})

    @property
    def sizes(self) -> Sizes:
        b, l, h, _ = self.q.shape
        return Sizes(b, h, l, self.k.shape[1])

    @property
    def static_positions(self) -> bool:
        """Whether positions are row and column numbers, so that masks can be judged by tile."""
        return self.q_pos is None and self.k_pos is None

    def tile_state(self, rows: range, cols: range) -> TileState:
        """What the mask does to a block of scores."""
        if self.static_positions:
            return self.mask.tile_state(rows, cols)
        return self.mask.tile_state(None, None)

    @property
    def score_dtype(self) -> jnp.dtype:
        """Of scores, normalisers and sums: float32, or float64 for float64 inputs."""
        return jnp.promote_types(self.q.dtype, jnp.float32)
