"""L2ViT: windows of softmax attention and, in turn with them, linear attention over the whole map.

Linear attention lacks the focus of softmax; a local concentration module of two wide depth-wise
convolutions after it brings that back (section 3). Maps are sequences (B, H W, D), row after row.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxformer.errors import ConfigError
from jaxformer.kernels.attention import Full, Mask
from jaxformer.models.encoder import Classifier
from jaxformer.models.hierarchical import Hierarchy
from jaxformer.models.transformer import Transformer
from jaxformer.models.variant import Variant
from jaxformer.nn.activation import GELU
from jaxformer.nn.attention import Attention
from jaxformer.nn.batch_norm import BatchNorm, ConvStem
from jaxformer.nn.block import PreNorm, Stack
from jaxformer.nn.depthwise import ConvPosition, DepthwiseConv
from jaxformer.nn.linear_attention import LinearAttention
from jaxformer.nn.make import Make
from jaxformer.nn.mlp import MLP
from jaxformer.nn.norm import LayerNorm
from jaxformer.nn.patch import ConvMerge, to_map
from jaxformer.nn.window import Windowed
from jaxformer.parallel.sharding import constrain

FULL = Full()


class ClampedLinearAttention(LinearAttention):
    """tau q . sum_j k_j v_j / max(q . sum_j k_j, clamp), q and k rectified, tau one per head.

    tau starts at 1 / sqrt(K). Below the clamp a row of weights does not sum to tau but to tau times
    its raw denominator over the clamp; None has no clamp.
    """

    clamp: float | None = 100.0

    def feature(self, x: jax.Array) -> jax.Array:
        return jax.nn.relu(x)

    def normalised(self, y: jax.Array, raw_BxLxHx1: jax.Array) -> jax.Array:
        init = jax.nn.initializers.constant(y.shape[-1] ** -0.5)
        tau = self.param("temperature", init, y.shape[2:3], jnp.float32)
        # Without a clamp a row whose features are all 0 has nothing to divide.
        least = 1e-6 if self.clamp is None else self.clamp
        return y * tau[:, None] / jnp.maximum(raw_BxLxHx1, least)


class LocalConcentration(nn.Module):
    """Depth-wise convolution, GELU, norm over the batch, depth-wise convolution."""

    grid: tuple[int, int]
    size: int = 7

    @nn.compact
    def __call__(self, x_BxLxD: jax.Array, *, train: bool = False) -> jax.Array:
        x = to_map(x_BxLxD, self.grid, "LocalConcentration")
        x = DepthwiseConv(self.size, name="conv_1")(x)
        x = BatchNorm(name="norm")(GELU(name="activation")(x), train=train)
        return DepthwiseConv(self.size, name="conv_2")(x).reshape(x_BxLxD.shape)


class WindowBlock(nn.Module):
    """LWA: position, windows of attention, position, MLP. Positions act on the stream itself."""

    mixer: Make
    mlp: Make
    position: Make
    residual: Make = Make(PreNorm)

    @nn.compact
    def __call__(self, x_BxLxD: jax.Array, *, mask: Mask = FULL, train: bool = False) -> jax.Array:
        mixer, mlp = self.mixer(name="mixer"), self.mlp(name="mlp")
        x_BxLxD = self.position(name="position_1")(x_BxLxD)
        x_BxLxD = self.residual(name="mixer_residual")(
            x_BxLxD, lambda y: mixer(y, mask=mask, train=train), train=train
        )
        x_BxLxD = self.position(name="position_2")(x_BxLxD)
        x_BxLxD = self.residual(name="mlp_residual")(
            x_BxLxD, lambda y: mlp(y, train=train), train=train
        )
        return constrain(x_BxLxD, ("batch", "length", "embed"))


class GlobalBlock(nn.Module):
    """LGA: position, linear attention, local concentration, MLP; without `local`, two branches."""

    mixer: Make
    mlp: Make
    position: Make
    local: Make | None
    residual: Make = Make(PreNorm)

    @nn.compact
    def __call__(self, x_BxLxD: jax.Array, *, mask: Mask = FULL, train: bool = False) -> jax.Array:
        mixer, mlp = self.mixer(name="mixer"), self.mlp(name="mlp")
        x_BxLxD = self.position(name="position")(x_BxLxD)
        x_BxLxD = self.residual(name="mixer_residual")(
            x_BxLxD, lambda y: mixer(y, mask=mask, train=train), train=train
        )
        if self.local is not None:
            local = self.local(name="local")
            x_BxLxD = self.residual(name="local_residual")(
                x_BxLxD, lambda y: local(y, train=train), train=train
            )
        x_BxLxD = self.residual(name="mlp_residual")(
            x_BxLxD, lambda y: mlp(y, train=train), train=train
        )
        return constrain(x_BxLxD, ("batch", "length", "embed"))


BLOCKS = {"mixed": ("window", "global"), "window": ("window",), "global": ("global",)}


def l2vit(
    *,
    image_size: tuple[int, int],
    widths: tuple[int, ...],
    depths: tuple[int, ...],
    heads: tuple[int, ...],
    classes: int,
    window: int = 7,
    mlp_ratio: tuple[float, ...] | float = 4.0,
    blocks: str = "mixed",
    local: bool = True,
    clamp: float | None = 100.0,
    drop_path: float = 0.0,
    dtype: str = "float32",
) -> Classifier:
    """Images (B, *image_size, channels) to classes, at 1/4, 1/8, ... of the image, mean-pooled.

    `blocks` takes windows and linear attention in turn ("mixed") or one of them alone; `local` is
    the concentration module. `drop_path` grows linearly over all blocks.

    Raises:
        ConfigError: stages differ in number, or a field has a value that is not allowed.
    """
    if not len(widths) == len(depths) == len(heads):
        raise ConfigError(
            f"model.heads={heads}: one for each stage, as model.widths={widths} and "
            f"model.depths={depths}"
        )
    if blocks not in BLOCKS:
        raise ConfigError(f"model.blocks={blocks!r}: must be one of {', '.join(BLOCKS)}")
    if window < 1:
        raise ConfigError(f"model.window={window}: must be at least 1")
    ratios = (mlp_ratio,) * len(widths) if isinstance(mlp_ratio, float | int) else mlp_ratio
    drops = iter([drop_path * i / max(sum(depths) - 1, 1) for i in range(sum(depths))])
    grid, stages, merges = tuple(-(-side // 4) for side in image_size), [], []
    for stage, (width, depth) in enumerate(zip(widths, depths, strict=True)):
        if stage:
            merges.append(Make(ConvMerge, grid=grid, features=width))
            grid = tuple(-(-side // 2) for side in grid)
        parts = {
            "mlp": Make(MLP, hidden=int(ratios[stage] * width)),
            "position": Make(ConvPosition, grid=grid),
        }
        attention = Make(Attention, heads=heads[stage])
        kinds = {
            "window": Make(
                WindowBlock,
                mixer=Make(Windowed, mixer=attention, grid=grid, window=window),
                **parts,
            ),
            "global": Make(
                GlobalBlock,
                mixer=Make(ClampedLinearAttention, heads=heads[stage], clamp=clamp),
                local=Make(LocalConcentration, grid=grid) if local else None,
                **parts,
            ),
        }
        order = BLOCKS[blocks]

        def block(i: int, kinds: dict[str, Make] = kinds, order: tuple[str, ...] = order) -> Make:
            kind = kinds[order[i % len(order)]]
            residual = Make(PreNorm, drop_path=next(drops))
            return Make(kind.cls, **{**dict(kind.arguments), "residual": residual})

        stages.append(Make(Stack, blocks=tuple(block(i) for i in range(depth))))
    embed = Make(ConvStem, width=widths[0], dtype=jnp.dtype(dtype))
    parts = {"stages": tuple(stages), "merges": tuple(merges)}
    return Classifier(Make(Hierarchy, embed=embed, embed_norm=Make(LayerNorm), **parts), classes)


def variant(trunk: Transformer, length: int) -> Variant:
    """Its linear attention, clamp and all, in any plain model; concentration is for maps."""
    del length
    return Variant(Make(ClampedLinearAttention, heads=trunk.heads))
