"""Stochastically subsampled attention, a strategy to train any Transformer.

A dense Transformer holds many sparse ones, its information pathways. Each step trains some: every
layer attends to a random subset of the keys (`jaxformer.nn.subsample`). A short dense phase makes
them one again; or they speak one by one, as an ensemble (`jaxformer.models.ensemble`).
"""

from __future__ import annotations

from ml_collections import ConfigDict

from jaxformer.models.transformer import Transformer, require
from jaxformer.models.variant import Variant
from jaxformer.nn.make import Make
from jaxformer.nn.subsample import Local, SourceDropout, SubsampledAttention, Unbiased


def mixer(trunk: Transformer, model: ConfigDict) -> Make:
    """The attention that trains on the keys of `model.draw`; plain attention if it is "dense"."""
    require("model.draw", model.draw, ("unbiased", "local", "dropout", "dense"))
    dense = trunk.attention()
    if model.draw == "dense":
        return dense
    if model.draw == "unbiased":
        draw: Unbiased | Local | SourceDropout = Unbiased(model.keep)
    elif model.draw == "local":
        draw = Local(model.window, None if model.spread == -1.0 else model.spread)
    else:
        draw = SourceDropout(model.rate)
    return Make(SubsampledAttention, **dict(dense.arguments), draw=draw)


def variant(trunk: Transformer, length: int) -> Variant:
    """Training on keys drawn in windows of 64, or of an eighth where sequences are shorter."""
    draw = Local(max(min(length // 8, 64), 1))
    return Variant(Make(SubsampledAttention, **dict(trunk.attention().arguments), draw=draw))
