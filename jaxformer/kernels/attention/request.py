"""One attention call as a value: what every implementation receives."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jaxformer.kernels.attention.masks import Mask, TileState
from jaxformer.kernels.attention.mods import ProbMod, ScoreMod
from jaxformer.kernels.attention.operands import Operand, Sizes
from jaxformer.kernels.dispatch import Refusal


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
    lse: bool = False  # whether the caller reads the LSE

    @property
    def two_pass(self) -> bool:
        """Whether the normaliser must be known before the weights are."""
        return self.prob_mod is not None and not self.prob_mod.linear


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Request:
    """A checked call: arrays as the caller gave them, batch-major, and the rules.

    q (B, L, H, K), k (B, S, G, K), v (B, S, G, Kv), sink (H,), q_pos (L,) or (B, L), k_pos alike,
    seed a uint32 scalar. `origin` is the (batch row, query head) of the first of a part of a call
    that is divided over devices, (2,) int32.
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
    origin: jax.Array | None = None

    @property
    def sizes(self) -> Sizes:
        b, l, h, _ = self.q.shape
        return Sizes(b, h, l, self.k.shape[1])

    def beyond_plain(self) -> Refusal | None:
        """What of the call a library's kernel cannot do, None if it is plain attention."""
        parts = {
            "score_mod": self.rules.score_mod,
            "prob_mod": self.rules.prob_mod,
            "a sink": self.sink,
            "dropout": self.seed,
            "q_pos": self.q_pos,
            "k_pos": self.k_pos,
            "a head_map that is not uniform": self.rules.head_map,
        }
        for feature, part in parts.items():
            if part is not None:
                return Refusal(feature, "it takes plain attention only")
        if self.rules.lse:
            return Refusal("return_lse", "its LSE has no gradient")
        return None

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
