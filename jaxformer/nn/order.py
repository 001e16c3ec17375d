"""Masks for mixers that are not free to follow any: an order and padding are all they know."""

from __future__ import annotations

import jax
from flax import linen as nn

from jaxformer.errors import ConfigError
from jaxformer.kernels.attention.array_masks import KeyPadding
from jaxformer.kernels.attention.masks import And, Causal, Full, Mask


def order_and_padding(reader: nn.Module, mask: Mask) -> tuple[bool, jax.Array | None]:
    """(causal, valid sources (B, S) or None) of a mask made of Full, Causal and KeyPadding.

    Raises:
        ConfigError: the mask says more than that, or is causal and has padding.
    """
    causal, valid_BxS = _read(reader, mask)
    if causal and valid_BxS is not None:
        raise ConfigError(
            f"mask: causal {type(reader).__name__} takes no padding; put it at the end of a "
            "sequence, where nothing before it sees it"
        )
    return causal, valid_BxS


def _read(reader: nn.Module, mask: Mask) -> tuple[bool, jax.Array | None]:
    if isinstance(mask, And):
        (a, b), (c, d) = _read(reader, mask.a), _read(reader, mask.b)
        valid = [x for x in (b, d) if x is not None]
        return a or c, valid[0] & valid[-1] if valid else None
    if isinstance(mask, KeyPadding) and mask.valid.ndim == 2:
        return False, mask.valid
    if mask in (Full(), Causal()):
        return mask == Causal(), None
    raise ConfigError(
        f"mask: {type(reader).__name__} does not hold all pairwise scores and cannot follow "
        f"{type(mask).__name__}; allowed: Full, Causal, KeyPadding of booleans (B, S)"
    )
