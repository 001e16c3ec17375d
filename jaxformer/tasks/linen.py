"""Flax Linen modules as the pure functions that a `Task` is made of.

Of a state's `extra`, the entries that are mappings are handed to the module as its collections, by
name; what a module does not know it leaves alone.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxformer.recipe import Extra, Params

CALL_ONLY = ("params", "cache", "intermediates")  # collections that are no part of `extra`


def init(model: nn.Module, key: jax.Array, *args: Any, **kwargs: Any) -> tuple[Params, Extra]:
    """Parameters and extra variables of `model` called with these arguments."""
    variables = model.init(key, *args, **kwargs)
    extra = {name: tree for name, tree in variables.items() if name not in CALL_ONLY}
    return variables["params"], extra


def apply(
    model: nn.Module,
    params: Params,
    extra: Extra,
    *args: Any,
    key: jax.Array,
    train: bool,
    **kwargs: Any,
) -> tuple[Any, Extra]:
    """The output, and `extra` with what the module changed of it, which it may while training."""
    collections = _collections(extra)
    variables = {"params": params, **collections}
    if not train:
        return model.apply(variables, *args, train=False, **kwargs), extra
    rngs = {"dropout": key}
    mutable = list(collections)
    output, changed = model.apply(
        variables, *args, train=True, rngs=rngs, mutable=mutable, **kwargs
    )
    return output, {**extra, **changed}


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def start_cache(model: nn.Module, batch_size: int, length: int) -> Any:
    """The empty decode state of a token model for sequences of at most `length` tokens.

    Its variables have the values with which the model declares them; the parameters that are
    initialised on the way are not used, so that the compiler drops them.
    """
    tokens = jnp.zeros((batch_size, length), jnp.int32)
    return model.init(jax.random.key(0), tokens, decode=True).get("cache", {})


def decode(
    model: nn.Module, params: Params, extra: Extra, cache: Any, tokens_BxL: jax.Array
) -> tuple[jax.Array, Any]:
    """Read further tokens: the output (B, L, ...) for them and the new decode state."""
    variables = {"params": params, **_collections(extra), "cache": cache}
    output, changed = model.apply(variables, tokens_BxL, decode=True, mutable=["cache"])
    return output, changed.get("cache", {})


def _collections(extra: Extra) -> dict[str, Any]:
    return {name: tree for name, tree in extra.items() if isinstance(tree, Mapping)}
