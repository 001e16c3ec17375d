"""What a backward pass computes again instead of keeping, by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from flax import linen as nn

from jaxformer.errors import ConfigError

_saved = jax.checkpoint_policies

# From what costs most memory to what costs most work. "Weight products" are those of activations
# with parameters; scores, which have the batch on both sides, are computed again under all of them.
REMATS: dict[str, Callable[..., Any] | None] = {
    "none": None,
    "dots": _saved.dots_saveable,  # every product is kept, scores too where they are products
    "weight_dots": _saved.dots_with_no_batch_dims_saveable,
    # Weight products wait in the host's memory: for TPUs and GPUs.
    "weight_dots_on_host": _saved.offload_dot_with_no_batch_dims("device", "pinned_host"),
    "full": _saved.nothing_saveable,  # a block keeps its input alone
}


def rematerialised(call: Callable[..., Any], name: str, *, in_loop: bool) -> Callable[..., Any]:
    """`call(module, ...)` that keeps for its backward pass what `name`, a key of `REMATS`, says.

    `in_loop`: the call is the body of a scan, which is not merged with its recomputation, so the
    guard against that is not needed.

    Raises:
        ConfigError: there is no such policy.
    """
    if name not in REMATS:
        raise ConfigError(f"model.remat={name!r}: must be one of {', '.join(REMATS)}")
    policy = REMATS[name]
    return call if policy is None else nn.remat(call, prevent_cse=not in_loop, policy=policy)
