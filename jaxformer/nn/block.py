"""Residual blocks and stacks of them. What a block is made of is passed in."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxformer.errors import ConfigError
from jaxformer.kernels.attention import Mask
from jaxformer.nn.cache import DecodeUnsupported
from jaxformer.nn.dropout import Dropout
from jaxformer.nn.make import Make
from jaxformer.nn.norm import LayerNorm
from jaxformer.nn.remat import rematerialised
from jaxformer.parallel.sharding import constrain


class Mixer(Protocol):
    """A part that moves information between positions."""

    def __call__(
        self,
        x_BxLxD: jax.Array,
        kv_BxSxD: jax.Array | None = None,
        *,
        mask: Mask,
        positions: jax.Array | None = None,
        train: bool = False,
        decode: bool = False,
    ) -> jax.Array:
        """Read from x itself or from `kv`; (B, L, D).

        `positions`, (L,) or (B, L), are for position schemes; masks go by row and column. With
        decode=True, x continues the sequence that the collection "cache" has read so far, and
        counts its positions itself; a mixer that cannot raises
        `jaxformer.nn.cache.DecodeUnsupported`.
        """
        ...


class Residual(nn.Module):
    """How a branch joins the stream; abstract. `layer_scale` starts as that number.

    Dropout acts on the output of the branch, `drop_path` drops the branch for whole rows
    (Huang et al. 2016, arXiv 1603.09382), layer scale is of Touvron et al. 2021, arXiv 2103.17239.
    """

    norm: Make = Make(LayerNorm)
    dropout: float = 0.0
    drop_path: float = 0.0
    layer_scale: float | None = None

    def join(self, x_BxLxD: jax.Array, y_BxLxD: jax.Array, *, train: bool) -> jax.Array:
        """Add the branch's output y to the stream, whose dtype is kept."""
        y_BxLxD = Dropout(self.dropout, name="dropout")(y_BxLxD, train=train)
        if self.layer_scale is not None:
            init = jax.nn.initializers.constant(self.layer_scale)
            gain = self.param("layer_scale", init, x_BxLxD.shape[-1:], jnp.float32)
            y_BxLxD = y_BxLxD * gain.astype(y_BxLxD.dtype)
        y_BxLxD = Dropout(self.drop_path, shared=(1, 2), name="drop_path")(y_BxLxD, train=train)
        return x_BxLxD + y_BxLxD.astype(x_BxLxD.dtype)


Branch = Callable[[jax.Array], jax.Array]


class PreNorm(Residual):
    """x + branch(norm(x))."""

    @nn.compact
    def __call__(self, x_BxLxD: jax.Array, branch: Branch, *, train: bool) -> jax.Array:
        return self.join(x_BxLxD, branch(self.norm(name="norm")(x_BxLxD)), train=train)


class PostNorm(Residual):
    """norm(x + branch(x)), as in the first Transformer."""

    @nn.compact
    def __call__(self, x_BxLxD: jax.Array, branch: Branch, *, train: bool) -> jax.Array:
        return self.norm(name="norm")(self.join(x_BxLxD, branch(x_BxLxD), train=train))


class Block(nn.Module):
    """A mixer, then an MLP, each on a residual branch; `mlp_residual` where theirs differ.

    What a call has beyond the arguments of every `Mixer` goes to the mixer.
    """

    mixer: Make
    mlp: Make
    residual: Make = Make(PreNorm)
    mlp_residual: Make | None = None

    @nn.compact
    def __call__(
        self,
        x_BxLxD: jax.Array,
        kv_BxSxD: jax.Array | None = None,
        *,
        mask: Mask,
        positions: jax.Array | None = None,
        train: bool = False,
        decode: bool = False,
        **more: Any,
    ) -> jax.Array:
        mixer, mlp = self.mixer(name="mixer"), self.mlp(name="mlp")

        def mix(y_BxLxD: jax.Array) -> jax.Array:
            options = {"positions": positions, "train": train, "decode": decode, **more}
            return mixer(y_BxLxD, kv_BxSxD, mask=mask, **options)

        def feed(y_BxLxD: jax.Array) -> jax.Array:
            return mlp(y_BxLxD, train=train)

        x_BxLxD = self.residual(name="mixer_residual")(x_BxLxD, mix, train=train)
        mlp_residual = self.mlp_residual or self.residual
        x_BxLxD = mlp_residual(name="mlp_residual")(x_BxLxD, feed, train=train)
        return constrain(x_BxLxD, ("batch", "length", "embed"))


class CrossBlock(nn.Module):
    """A block of a decoder that reads a memory: a mixer, a mixer of the memory `kv`, an MLP.

    `mask` is that of the first, `kv_mask` that of the memory.
    """

    mixer: Make
    cross: Make
    mlp: Make
    residual: Make = Make(PreNorm)

    @nn.compact
    def __call__(
        self,
        x_BxLxD: jax.Array,
        kv_BxSxD: jax.Array,
        *,
        mask: Mask,
        kv_mask: Mask,
        train: bool = False,
        decode: bool = False,
        **more: Any,
    ) -> jax.Array:
        mixer, cross = self.mixer(name="mixer"), self.cross(name="cross")
        mlp = self.mlp(name="mlp")

        def mix(y_BxLxD: jax.Array) -> jax.Array:
            return mixer(y_BxLxD, mask=mask, train=train, decode=decode, **more)

        def read(y_BxLxD: jax.Array) -> jax.Array:
            return cross(y_BxLxD, kv_BxSxD, mask=kv_mask, train=train, decode=decode)

        def feed(y_BxLxD: jax.Array) -> jax.Array:
            return mlp(y_BxLxD, train=train)

        for name, branch in (("mixer", mix), ("cross", read), ("mlp", feed)):
            residual = self.residual(name=f"{name}_residual")
            x_BxLxD = residual(x_BxLxD, branch, train=train)
        return constrain(x_BxLxD, ("batch", "length", "embed"))


class PerLayer(tuple):
    """An argument of a stack, by keyword, that is another one for each of its blocks."""


class Stack(nn.Module):
    """Blocks one after another, each with parameters of its own: "block_0", "block_1", ...

    `remat` names what the backward pass computes again (`jaxformer.nn.remat`). All arguments after
    the stream reach every block; of a `PerLayer` each receives its own. `inserts` are modules from
    stream to stream, each before the block of its number; what they are told beside is `between`.
    The whole runs `repeat` times with the same weights (Dehghani et al. 2018, arXiv 1807.03819),
    and cannot decode step by step then: its blocks have one cache each.
    """

    blocks: tuple[Make, ...]
    remat: str = "none"
    inserts: tuple[tuple[int, Make], ...] = ()
    repeat: int = 1

    @nn.compact
    def __call__(
        self,
        x_BxLxD: jax.Array,
        *args: Any,
        between: Mapping[str, Any] = MappingProxyType({}),
        **kwargs: Any,
    ) -> jax.Array:
        if self.repeat > 1 and kwargs.get("decode"):
            raise DecodeUnsupported(self)
        inserts = {i: module(name=f"insert_{i}") for i, module in self.inserts}
        blocks = [block(name=f"block_{i}") for i, block in enumerate(self.blocks)]
        for i, block in [*enumerate(blocks)] * self.repeat:
            if i in inserts:
                x_BxLxD = inserts[i](x_BxLxD, **between)
            own = {name: x[i] if isinstance(x, PerLayer) else x for name, x in kwargs.items()}

            def call(block: nn.Module, x_BxLxD: jax.Array, own: Any = own) -> jax.Array:
                return block(x_BxLxD, *args, **own)

            call = rematerialised(call, self.remat, in_loop=False)
            x_BxLxD = call(block, x_BxLxD)
        return x_BxLxD


def insert(stack: Make, at: int, module: Make) -> Make:
    """`stack` with `module` before its block number `at`; the names of its blocks stay.

    Raises:
        ConfigError: a scanned stack, or one without such a block.
    """
    if stack.cls is not Stack:
        raise ConfigError("model.scan=True: scanned blocks are alike, none can follow an insert")
    parts = dict(stack.arguments)
    if not 0 <= at < len(parts["blocks"]):
        raise ConfigError(f"insert at {at}: the stack has blocks 0 to {len(parts['blocks']) - 1}")
    return stack.replace(inserts=(*parts.get("inserts", ()), (at, module)))


class ScannedStack(nn.Module):
    """`Stack((block,) * depth)` as one loop: compile time does not grow with depth.

    The variables of all layers lie along a first axis, under "blocks"; `stack_layers` and
    `unstack_layers` convert. Interceptions see one block for all layers.
    """

    block: Make
    depth: int
    remat: str = "none"
    repeat: int = 1

    @nn.compact
    def __call__(self, x_BxLxD: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
        if self.repeat > 1 and kwargs.get("decode"):
            raise DecodeUnsupported(self)
        for name, x in kwargs.items():
            if isinstance(x, PerLayer):
                if any(other != x[0] for other in x[1:]):
                    raise ConfigError(
                        f"model.scan=True: scanned blocks are alike, but {name!r} differs by "
                        "layer; set model.scan=False"
                    )
                kwargs[name] = x[0]

        def call(block: nn.Module, x_BxLxD: jax.Array, _: None) -> tuple[jax.Array, None]:
            return block(x_BxLxD, *args, **kwargs), None

        call = rematerialised(call, self.remat, in_loop=True)
        scan = nn.scan(call, variable_axes={True: 0}, split_rngs={True: True}, length=self.depth)
        block = self.block(name="blocks")
        for _ in range(self.repeat):
            x_BxLxD, _ = scan(block, x_BxLxD, None)
        return x_BxLxD


def stack_layers(tree: Any) -> Any:
    """Variables of every `Stack` in the tree as those of a `ScannedStack`.

    Raises:
        ConfigError: the blocks of a stack differ in structure or shapes.
    """
    if not isinstance(tree, Mapping):
        return tree
    layers = sorted((k for k in tree if re.fullmatch(r"block_\d+", k)), key=lambda k: int(k[6:]))
    rest = {name: stack_layers(child) for name, child in tree.items() if name not in layers}
    if not layers:
        return rest
    try:
        stacked = jax.tree.map(lambda *x: jnp.stack(x), *(stack_layers(tree[k]) for k in layers))
    except ValueError as error:
        raise ConfigError(
            f"stack_layers: {layers[0]} .. {layers[-1]} differ in structure or shapes and cannot "
            f"be scanned; keep them unrolled ({' '.join(str(error).split())[:200]})"
        ) from error
    return {**rest, "blocks": stacked}


def unstack_layers(tree: Any) -> Any:
    """Variables of every `ScannedStack` in the tree as those of a `Stack`."""
    if not isinstance(tree, Mapping):
        return tree
    rest = {name: unstack_layers(child) for name, child in tree.items() if name != "blocks"}
    if "blocks" not in tree:
        return rest
    stacked = unstack_layers(tree["blocks"])
    depth = jax.tree.leaves(stacked)[0].shape[0]
    layers = {f"block_{i}": jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(depth)}
    return {**rest, **layers}
