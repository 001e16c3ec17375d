"""Softmax attention: the op, its masks, the operands of its modifications."""

from jaxformer.kernels.attention.api import attention, explain, merge, plan
from jaxformer.kernels.attention.array_masks import DenseMask, KeyPadding, Prefix, Segments
from jaxformer.kernels.attention.choice import AttentionUnsupported
from jaxformer.kernels.attention.masks import (
    And,
    BlockSparse,
    Causal,
    Diagonal,
    Full,
    Mask,
    MaskMod,
    Or,
    TileState,
    Window,
    dense,
)
from jaxformer.kernels.attention.mods import ProbMod, ScoreMod, ste_round
from jaxformer.kernels.attention.operands import (
    Idx,
    Operand,
    PerHead,
    PerK,
    PerQ,
    Scalar,
    Tile,
    Toeplitz,
)

__all__ = [
    "And",
    "AttentionUnsupported",
    "BlockSparse",
    "Causal",
    "DenseMask",
    "Diagonal",
    "Full",
    "Idx",
    "KeyPadding",
    "Mask",
    "MaskMod",
    "Operand",
    "Or",
    "PerHead",
    "PerK",
    "PerQ",
    "Prefix",
    "ProbMod",
    "Scalar",
    "ScoreMod",
    "Segments",
    "Tile",
    "TileState",
    "Toeplitz",
    "Window",
    "attention",
    "dense",
    "explain",
    "merge",
    "plan",
    "ste_round",
]
