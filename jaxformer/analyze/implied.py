"""The weights that a mixer implies: what each output takes from each position's value."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxformer.kernels.attention import Mask


def implied_weights(
    mixer: nn.Module, variables: Any, x_BxLxD: jax.Array, *, mask: Mask, keep: Sequence[str] = ()
) -> jax.Array:
    """(B, H, L, S): the weight of value s in the head output l, as the mixer forms it from `x`.

    For mixers that project by modules "value" and "out" and are linear in the values between: the
    values become unit vectors and the heads' outputs are read off. Modules named in `keep`, which
    make scores out of values, give what they give for the values as they are.
    """
    kept: dict[tuple[str, ...], Any] = {}

    def remember(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        y = call(*args, **kwargs)
        if context.module.name in keep:
            kept[context.module.path] = y
        return y

    found: list[jax.Array] = []

    def units(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        path = context.module.path
        if path in kept:
            return kept[path]
        if path == ("value",):
            batch, length, heads = call(*args, **kwargs).shape[:3]
            unit = jnp.eye(length, dtype=x_BxLxD.dtype)[None, :, None]
            return jnp.broadcast_to(unit, (batch, length, heads, length))
        if path == ("out",):
            found.append(args[0])
            return x_BxLxD
        return call(*args, **kwargs)

    if keep:
        with nn.intercept_methods(remember):
            mixer.apply(variables, x_BxLxD, mask=mask)
    with nn.intercept_methods(units):
        mixer.apply(variables, x_BxLxD, mask=mask)
    return jnp.moveaxis(found[0], 1, 2)
