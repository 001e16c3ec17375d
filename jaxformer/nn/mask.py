"""Masks as seen by mixers that never form pairwise scores."""

from __future__ import annotations

import jax

from jaxformer.kernels.attention.masks import And, Causal, Full, KeyPadding, Mask
from jaxformer.recipe import ConfigError


def causal_and_valid(mask: Mask, who: str) -> tuple[bool, jax.Array | None]:
    """(causal, valid sources (B, S) bool or None) of a mask that a sum over sources can follow.

    Raises:
        ConfigError: any other mask, in the name of `who`.
    """
    if isinstance(mask, And):
        (a, b), (c, d) = causal_and_valid(mask.a, who), causal_and_valid(mask.b, who)
        valid = [x for x in (b, d) if x is not None]
        return a or c, valid[0] & valid[-1] if valid else None
    if isinstance(mask, KeyPadding) and mask.valid.ndim == 2:
        return False, mask.valid
    if mask in (Full(), Causal()):
        return mask == Causal(), None
    raise ConfigError(
        f"mask: {who} has no pairwise scores and cannot follow {type(mask).__name__}; "
        "allowed: Full, Causal, KeyPadding of booleans (B, S)"
    )
