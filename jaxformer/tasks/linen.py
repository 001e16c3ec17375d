"""Flax Linen modules as the pure functions that a `Task` is made of.

Of a state's `extra`, the entries that are mappings are handed to the module as its collections, by
name; what a module does not know it leaves alone.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

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
    found = answer(model, params, extra, *args, key=key, train=train, **kwargs)
    return found.output, found.extra


class Answer(NamedTuple):
    """What a module said: its output, what its parts sowed on the way, the new `extra`."""

    output: Any
    sown: Mapping[str, Any]  # {"block_0": {"mixer": {"name": (value,)}}}
    extra: Extra


def answer(
    model: nn.Module,
    params: Params,
    extra: Extra,
    *args: Any,
    key: jax.Array,
    train: bool,
    **kwargs: Any,
) -> Answer:
    """As `apply`, with what modules sowed as "intermediates"."""
    collections = _collections(extra)
    variables = {"params": params, **collections}
    rngs = {"dropout": key} if train else {}
    mutable = ["intermediates", *(collections if train else ())]
    output, changed = model.apply(
        variables, *args, train=train, rngs=rngs, mutable=mutable, **kwargs
    )
    sown = changed.pop("intermediates", {})
    return Answer(output, sown, {**extra, **changed} if train else extra)


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
