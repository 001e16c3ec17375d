"""3DTRL: patches of a picture at places in space, found without labels, told to their tokens.

Symbols: z pseudo-depth of a patch, p its point in the camera's frame, R and t the camera of the
picture, P = p R + t the point in a frame that all pictures share. Axes: B pictures, or clips whose
frames are a second axis; N patches, in rows; C the width.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxformer.errors import ConfigError
from jaxformer.models.encoder import Classifier
from jaxformer.models.transformer import Transformer, require
from jaxformer.models.vit import vit
from jaxformer.nn.block import insert
from jaxformer.nn.einsum import Einsum
from jaxformer.nn.geometry import cell_centres, euler_rotation, lift
from jaxformer.nn.make import Make

SIZE = 32  # of what rotation and translation are read from


def linear(x: jax.Array, features: int, name: str, **how: Any) -> jax.Array:
    """(..., C) to (..., features), started uniformly within 1 / sqrt(C) as the authors' layers."""

    def start(key: jax.Array, shape: Any, dtype: Any = jnp.float32) -> jax.Array:
        bound = x.shape[-1] ** -0.5
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    how = {"kernel_init": start, "bias_init": start, **how}
    return Einsum("...C,CD->...D", (features,), name=name, **how)(x)


class MLP(nn.Module):
    """Linear, ReLU, linear; with `last`, another ReLU."""

    hidden: int
    features: int
    last: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = linear(nn.relu(linear(x, self.hidden, "in")), self.features, "out")
        return nn.relu(y) if self.last else y


class Tokens(nn.Module):
    """What all tokens say of the camera: their mean between two layers; (B, C)."""

    @nn.compact
    def __call__(self, x_BxNxC: jax.Array) -> jax.Array:
        width = x_BxNxC.shape[-1]
        mean = nn.relu(linear(x_BxNxC, width, "in")).mean(range(1, x_BxNxC.ndim - 1))
        return nn.relu(linear(mean, width, "out"))


class Pose(nn.Module):
    """The camera of a picture or clip: R (B, 3, 3) and t (B, 3).

    `source`: "both-sep" adds what the class token and what the patches say, "both-avg" asks them
    all alike, "cls" and "tok" ask one of the two.
    """

    source: str

    @nn.compact
    def __call__(
        self, class_BxC: jax.Array | None, patches_BxNxC: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        width, s = patches_BxNxC.shape[-1], 0.0
        if self.source == "both-avg":
            assert class_BxC is not None
            patches_BxNxC = jnp.concatenate([class_BxC[..., None, :], patches_BxNxC], -2)
        elif self.source != "tok":
            assert class_BxC is not None
            mean_BxC = class_BxC.mean(range(1, class_BxC.ndim - 1))  # over the frames of a clip
            s = MLP(width, width, last=True, name="class")(mean_BxC)
        if self.source != "cls":
            s = s + Tokens(name="tokens")(patches_BxNxC)
        mixed = MLP(SIZE, SIZE, name="mix")(s)
        angles = linear(mixed, 3, "rotation")
        return euler_rotation(angles), linear(mixed, 3, "translation", **_ALL_ONES)


_ALL_ONES = {"kernel_init": nn.initializers.ones, "bias_init": nn.initializers.zeros}
SOURCES = ("both-sep", "both-avg", "cls", "tok")


class Tokens3D(nn.Module):
    """Adds to each token an embedding of where its patch lies; a module of `Stack.inserts`.

    Tokens (B, 1 + N, C), the class token first, or (B, N, C) without one; frames of a clip, which
    share a camera, are an axis after B. `depth` predicts z, else the point itself is predicted.
    `concat` lets a layer read token and point together instead of adding. `grid` defaults to a
    square. The 2-D `position`, if there is one, is added once more.

    Raises:
        ConfigError: no such source; a source or tokens that do not fit; a grid that does not.
    """

    source: str = "both-sep"
    class_token: bool = True
    depth: bool = True
    concat: bool = False
    grid: tuple[int, int] | None = None

    @nn.compact
    def __call__(self, x: jax.Array, *, position: Any = None) -> jax.Array:
        require("model.source", self.source, SOURCES)
        if self.source != "tok" and not self.class_token:
            raise ConfigError(f"model.source={self.source!r}: needs a class token; allowed: tok")
        width = x.shape[-1]
        first, patches = x[..., :1, :] if self.class_token else None, x
        if first is not None:
            patches = x[..., 1:, :]
        uv = jnp.asarray(cell_centres(*self._grid(patches.shape[-2])))
        if self.depth:
            p = lift(uv, MLP(width, 1, name="depth")(patches)[..., 0])
        else:
            p = MLP(width, 3, name="point")(patches)
        rotation, translation = Pose(self.source, name="pose")(
            None if first is None else first[..., 0, :], patches
        )
        shape = (x.shape[0], *(1,) * (x.ndim - 3))  # one camera for all frames
        world = p @ rotation.reshape(*shape, 3, 3) + translation.reshape(*shape, 1, 3)
        for name, value in (("p", p), ("R", rotation), ("t", translation), ("P", world)):
            self.sow("intermediates", name, value)
        read = jnp.concatenate([patches, world], -1) if self.concat else world
        where = MLP(width, width, name="embed")(read)
        if first is not None:
            init = nn.initializers.normal(1.0)
            own = self.param("class_embed", init, (1, width), jnp.float32)
            own = jnp.broadcast_to(own.astype(x.dtype), first.shape)
            where = jnp.concatenate([own, where], -2)
        x = x + where
        return x if position is None else position(x)

    def _grid(self, count: int) -> tuple[int, int]:
        side = round(count**0.5)
        height, width = self.grid or (side, side)
        if height * width != count:
            raise ConfigError(
                f"model.grid={self.grid}: {count} patches are no {height} x {width} grid; give "
                "(rows, columns)"
            )
        return height, width


class Control(nn.Module):
    """As many parameters as `Tokens3D` with "both-sep", and no geometry: x + MLP(x)."""

    @nn.compact
    def __call__(self, x: jax.Array, *, position: Any = None) -> jax.Array:
        del position
        width = x.shape[-1]
        hidden = (6 * width**2 + 46 * width + 2281) // (2 * width + 1)
        return x + MLP(hidden, width, name="mlp")(x)


def viewpoint_vit(
    trunk: Transformer, *, layer: Make | None, at: int, image_size: int, patch: int, classes: int
) -> Classifier:
    """A ViT with a class token and `layer` before its block number `at`; plain if it is None."""
    model = vit(trunk, image_size=image_size, patch=patch, classes=classes)
    if layer is None:
        return model
    stack = insert(dict(model.encoder.arguments)["stack"], at, layer)
    return model.clone(encoder=model.encoder.replace(stack=stack))
