"""Token pruning: a trained model whose stream becomes shorter after some of its blocks.

`prune_tokens(model, {3: KeepTop(ClassAttention(), 0.5)})` drops half of the tokens after the third
block. The model, its parameters and its other blocks stay as they are. Which tokens are kept is
said by a `Pruner`, from what it is shown of the block: a part that is passed in.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxformer.compress.intercepted import Intercepted
from jaxformer.errors import ConfigError
from jaxformer.models.encoder import Classifier
from jaxformer.nn.attention import Attention, Fused, Softmax, Unfused
from jaxformer.nn.block import Block, Stack
from jaxformer.nn.make import Make, swap
from jaxformer.nn.position import Position
from jaxformer.parallel.sharding import constrain

KEPT = "kept_tokens"  # what is sown in the collection "intermediates"


class Seen(NamedTuple):
    """What a pruner is shown of a block: N tokens, of which the first `protected` always stay."""

    before_BxNxD: jax.Array  # the block's input
    after_BxNxD: jax.Array  # its output, which is pruned
    p_BxHxNxN: jax.Array  # softmax probabilities; rows sum to 1
    q_BxNxHxK: jax.Array
    k_BxNxGxK: jax.Array
    v_BxNxGxK: jax.Array
    protected: int = 1

    @property
    def free(self) -> int:
        """Tokens that may be dropped."""
        return self.after_BxNxD.shape[1] - self.protected


class Pruner(Protocol):
    """Which tokens stay: (B, M) int32, increasing in each row, the protected ones among them.

    How many is known from the number of tokens alone, so that shapes are static.
    """

    def __call__(self, seen: Seen) -> jax.Array: ...


def kept_count(keep: float, tokens: int) -> int:
    """floor(keep * tokens), for a `keep` in (0, 1].

    Raises:
        ConfigError: another `keep`, or none is kept.
    """
    if not 0.0 < keep <= 1.0:
        raise ConfigError(f"prune.keep={keep}: must be in (0, 1]")
    count = math.floor(keep * tokens + 1e-9)  # 0.7 * 10 is less than 7 in floating point
    if count < 1:
        raise ConfigError(f"prune.keep={keep}: keeps none of {tokens} tokens; give more")
    return count


def keep_best(scores_BxN: jax.Array, count: int, protected: int) -> jax.Array:
    """The `protected` tokens and the `count` others of the highest scores; of equals the first."""
    batch = scores_BxN.shape[0]
    _, best = jax.lax.top_k(scores_BxN[:, protected:], count)
    front = jnp.broadcast_to(jnp.arange(protected), (batch, protected))
    return jnp.concatenate([front, jnp.sort(best + protected, axis=-1)], axis=1).astype(jnp.int32)


class Score(Protocol):
    """How much each token is worth: (B, N)."""

    def __call__(self, seen: Seen) -> jax.Array: ...


@dataclasses.dataclass(frozen=True)
class KeepTop:
    """Keeps a share of the free tokens, less `removed`: those of the highest scores."""

    score: Score
    keep: float
    removed: int = 0

    def __call__(self, seen: Seen) -> jax.Array:
        count = kept_count(self.keep, seen.free - self.removed)
        return keep_best(self.score(seen), count, seen.protected)


@dataclasses.dataclass(frozen=True)
class Chance:
    """A random number for every token of every image: the control of every method."""

    seed: int = 0

    def __call__(self, seen: Seen) -> jax.Array:
        return jax.random.uniform(jax.random.key(self.seed), seen.after_BxNxD.shape[:2])


@dataclasses.dataclass(frozen=True)
class ClassAttention:
    """How much the class token attends to each, over all heads (as EViT and ATS rank tokens)."""

    def __call__(self, seen: Seen) -> jax.Array:
        if not seen.protected:
            raise ConfigError("ClassAttention: the model has no class token; take another score")
        return seen.p_BxHxNxN[:, :, 0].astype(jnp.float32).mean(1)


@dataclasses.dataclass(frozen=True)
class DropTokens:
    """The interceptor: block `i` of a `Stack` returns the tokens that `pruners[i]` keeps.

    Its core must be `Unfused`; `prune_tokens` sees to that. The indices are sown as "kept_tokens".
    """

    pruners: tuple[tuple[int, Pruner], ...]
    protected: int = 1

    def __call__(self, method: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module = context.module
        if not isinstance(module, Block) or context.method_name != "__call__":
            return method(*args, **kwargs)
        pruner = {f"block_{i}": pruner for i, pruner in self.pruners}.get(module.name)
        if pruner is None:
            return method(*args, **kwargs)
        caught: dict[str, Any] = {}

        def catch(method: Any, args: Any, kwargs: Any, context: Any) -> Any:
            y = method(*args, **kwargs)
            if context.method_name == "__call__" and isinstance(context.module, Unfused):
                caught["qkv"] = args
            elif context.method_name == "__call__" and isinstance(context.module, Softmax):
                caught["p"] = y
            return y

        with nn.intercept_methods(catch):
            x_BxNxD = method(*args, **kwargs)
        seen = Seen(args[0], x_BxNxD, caught["p"], *caught["qkv"], self.protected)
        kept_BxM = pruner(seen)
        module.sow("intermediates", KEPT, kept_BxM)
        if kept_BxM.shape[1] == x_BxNxD.shape[1]:
            return x_BxNxD  # all of them, in their order
        x_BxMxD = jnp.take_along_axis(x_BxNxD, kept_BxM[..., None], axis=1)
        return constrain(x_BxMxD, ("batch", "length", "embed"))


def prune_tokens(model: Classifier, layers: Mapping[int, Pruner]) -> Intercepted:
    """`model` with tokens dropped after the blocks of these numbers, of which the first is 1.

    Class tokens are kept. The blocks that prune spell out their attention, the others run fused.

    Raises:
        ConfigError: there is no such block, the blocks are scanned, or positions act inside
            attention, which would not know what is missing.
    """
    stack = dict(model.encoder.arguments)["stack"]
    if stack.cls is not Stack:
        raise ConfigError("model.scan=True: tokens are dropped by layer; set model.scan=False")
    if dict(model.encoder.arguments).get("scheme") is not None:
        raise ConfigError("prune.layers: layers share a position scheme, which depends on place")
    blocks = dict(stack.arguments)["blocks"]
    for number in layers:
        if not 1 <= number <= len(blocks):
            raise ConfigError(f"prune.layers: {number} is none of the blocks 1 to {len(blocks)}")
    for block in blocks:
        mixer = dict(block.arguments)["mixer"]
        position = dict(mixer.arguments).get("position", Make(Position))
        if not issubclass(mixer.cls, Attention) or position != Make(Position):
            raise ConfigError(
                f"prune.layers: {mixer.cls.__name__} with {position} depends on where tokens lie; "
                "prune plain attention with positions added to the embeddings"
            )
    opened = tuple(
        swap(block, Fused, Unfused) if i + 1 in layers else block for i, block in enumerate(blocks)
    )
    encoder = model.encoder.replace(stack=stack.replace(blocks=opened))
    protected = dict(encoder.arguments).get("class_tokens", 0)
    pruners = tuple((number - 1, layers[number]) for number in sorted(layers))
    return Intercepted(
        dataclasses.replace(model, encoder=encoder), (DropTokens(pruners, protected),)
    )


def kept_positions(intermediates: Mapping[str, Any], depth: int) -> jax.Array | None:
    """Which tokens of the embedding are left at the end, (B, M), of the sown indices of a call.

    `intermediates` is the stack's part of the collection; None if nothing was pruned.
    """
    found = None
    for i in range(depth):
        kept = intermediates.get(f"block_{i}", {}).get(KEPT)
        if kept is not None:
            found = kept[0] if found is None else jnp.take_along_axis(found, kept[0], axis=1)
    return found
