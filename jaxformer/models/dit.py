"""DiT: a Transformer that denoises images (Peebles & Xie 2022, arXiv 2212.09748)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxformer.errors import ConfigError
from jaxformer.nn.activation import GELU_TANH
from jaxformer.nn.attention import Attention, LogLength
from jaxformer.nn.block import PerLayer, ScannedStack, Stack
from jaxformer.nn.condition import PLAIN_NORM, AdaLNZero, Modulation, TimeEmbed, modulate
from jaxformer.nn.einsum import Einsum, Initializer, xavier_uniform
from jaxformer.nn.embed import Embed
from jaxformer.nn.grid import GridMask, full, places
from jaxformer.nn.make import Make
from jaxformer.nn.mlp import MLP
from jaxformer.nn.patch import PatchEmbed, join_patches
from jaxformer.nn.position import Position
from jaxformer.parallel.sharding import constrain


class ModulatedHead(nn.Module):
    """(B, L, D) to patches (B, L, P, P, channels): a norm, moved by the condition, and a map.

    Both the map and the modulation are 0 at the start, and so is the output. In float32.
    """

    patch: int
    channels: int
    norm: Make = PLAIN_NORM
    modulation: Make = Make(Modulation, parts=2)

    @nn.compact
    def __call__(self, x_BxLxD: jax.Array, c_BxD: jax.Array) -> jax.Array:
        shift, scale = self.modulation(name="modulation")(c_BxD)
        x_BxLxD = modulate(self.norm(name="norm")(x_BxLxD), shift, scale)
        features = (self.patch, self.patch, self.channels)
        options = {"kernel_init": jax.nn.initializers.zeros, "out_dtype": jnp.float32}
        return Einsum("...D,DPQC->...PQC", features, name="projection", **options)(x_BxLxD)


class DiT(nn.Module):
    """Noised images (B, height, width, C) at times (B,) to (B, height, width, channels).

    The condition of all layers is the sum of the embeddings of the time and of whatever else a
    call is given by name, such as `label` (B,). The grid of patches is read off each image, so any
    size and aspect will do: `masks` gives each layer what it may see of that grid, `position` acts
    on the patches, (x, grid, train=) -> x, and mixers receive the `places` of the grid.

    Raises:
        ConfigError: the patch does not divide the image, or a call has a condition that has no
            embedding, or lacks one.
    """

    embed: Make
    stack: Make
    head: Make
    time: Make
    masks: tuple[GridMask, ...]
    conditions: tuple[tuple[str, Make], ...] = ()  # name of the argument, its embedding
    position: Make | None = None

    @nn.compact
    def __call__(
        self, x: jax.Array, t_B: jax.Array, *, train: bool = False, **given: jax.Array
    ) -> jax.Array:
        names = [name for name, _ in self.conditions]
        if set(given) != set(names):
            raise ConfigError(f"model.conditions={names}: a call gave {sorted(given)}")
        embed = self.embed(name="embed")
        grid = x.shape[1] // embed.patch, x.shape[2] // embed.patch
        x_BxLxD = embed(x)
        if self.position is not None:
            x_BxLxD = self.position(name="position")(x_BxLxD, grid, train=train)
        c_BxD = self.time(name="time")(t_B)
        for name, condition in self.conditions:
            c_BxD = c_BxD + condition(name=f"{name}_embed")(given[name])
        x_BxLxD = constrain(x_BxLxD, ("batch", "length", "embed"))
        masks = PerLayer(mask(grid) for mask in self.masks)
        options = {"positions": places(grid), "train": train}
        x_BxLxD = self.stack(name="stack")(x_BxLxD, c_BxD, mask=masks, **options)
        y = self.head(name="head")(x_BxLxD, c_BxD)
        return constrain(join_patches(y, grid[0]), ("batch", "length", None, None))


def fused_xavier(equation: str) -> Initializer:
    """Xavier-uniform, where queries, keys and values count as one map, as in the authors' code."""
    return xavier_uniform(equation, 3 if equation == "...D,DHK->...HK" else 1)


def dit(
    *,
    width: int,
    depth: int,
    heads: int,
    patch: int,
    channels: int,
    hidden: int | None = None,
    labels: int = 0,
    masks: tuple[GridMask, ...] | None = None,
    position: Make | None = None,
    attention_position: Make = Make(Position),
    scale: LogLength | None = None,
    scan: bool = False,
    remat: str = "none",
    dtype: str = "float32",
) -> DiT:
    """A `DiT` that answers with `channels` per pixel.

    `labels` is how many labels there are, that for "no class" included; 0: none is given. `masks`
    are those of the layers, everything by default; `attention_position` acts inside attention;
    `scale` is that of scores where it depends on the length.

    Raises:
        ConfigError: not one mask per layer.
    """
    masks = (full,) * depth if masks is None else masks
    if len(masks) != depth:
        raise ConfigError(f"model.depth={depth}: got the masks of {len(masks)} layers")
    init, compute = fused_xavier, jnp.dtype(dtype)
    block = Make(
        AdaLNZero,
        mixer=Make(
            Attention, heads=heads, position=attention_position, scale=scale, kernel_init=init
        ),
        mlp=Make(MLP, hidden=hidden or 4 * width, activation=GELU_TANH, kernel_init=init),
    )
    stack: dict[str, Any] = {"cls": Stack, "blocks": (block,) * depth}
    if scan:
        stack = {"cls": ScannedStack, "block": block, "depth": depth}
    label = Make(Embed, vocabulary=labels, width=width, dtype=compute)
    return DiT(
        embed=Make(PatchEmbed, patch=patch, width=width, dtype=compute, kernel_init=init),
        stack=Make(**stack, remat=remat),
        head=Make(ModulatedHead, patch=patch, channels=channels),
        time=Make(TimeEmbed, width=width, dtype=compute),
        masks=masks,
        conditions=(("label", label),) if labels else (),
        position=position,
    )
