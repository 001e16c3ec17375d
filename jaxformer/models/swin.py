"""The Swin Transformer (Liu et al. 2021, arXiv 2103.14030): windows on a shrinking grid."""

from __future__ import annotations

import jax.numpy as jnp

from jaxformer.models.encoder import Classifier
from jaxformer.models.hierarchical import Hierarchy
from jaxformer.nn.activation import GELU
from jaxformer.nn.attention import Attention
from jaxformer.nn.block import Block, PreNorm, Stack
from jaxformer.nn.make import Make
from jaxformer.nn.mlp import MLP
from jaxformer.nn.norm import LayerNorm
from jaxformer.nn.patch import PatchEmbed, PatchMerge
from jaxformer.nn.window import WindowBias, Windowed


def swin(
    *,
    image_size: int,
    patch: int,
    width: int,
    depths: tuple[int, ...],
    heads: tuple[int, ...],
    window: int,
    classes: int,
    mlp_ratio: float = 4.0,
    qkv_bias: bool = True,
    activation: Make = GELU,
    epsilon: float = 1e-5,
    dropout: float = 0.0,
    attention_dropout: float = 0.0,
    drop_path: float = 0.0,
    dtype: str = "float32",
) -> Classifier:
    """Square images (B, image_size, image_size, channels) to classes.

    Every second block shifts its windows by half a window, unless the grid is one window. The
    width doubles where the grid halves; `drop_path` grows linearly over all blocks.
    """
    norm = Make(LayerNorm, epsilon=epsilon)
    drops = iter([drop_path * i / max(sum(depths) - 1, 1) for i in range(sum(depths))])
    side, stages, merges = image_size // patch, [], []
    for stage, (depth, count) in enumerate(zip(depths, heads, strict=True)):
        features = width * 2**stage
        if stage:
            merges.append(Make(PatchMerge, grid=(side, side), features=features, norm=norm))
            side = -(-side // 2)

        def block(i: int, features: int = features, count: int = count, side: int = side) -> Make:
            attention = Make(
                Attention,
                heads=count,
                position=Make(WindowBias, window=window),
                use_bias=qkv_bias,
                out_bias=True,
                dropout=attention_dropout,
            )
            shift = window // 2 if i % 2 and side > window else 0
            return Make(
                Block,
                mixer=Make(
                    Windowed, mixer=attention, grid=(side, side), window=window, shift=shift
                ),
                mlp=Make(MLP, hidden=int(mlp_ratio * features), activation=activation),
                residual=Make(PreNorm, norm=norm, dropout=dropout, drop_path=next(drops)),
            )

        stages.append(Make(Stack, blocks=tuple(block(i) for i in range(depth))))
    encoder = Make(
        Hierarchy,
        embed=Make(PatchEmbed, patch=patch, width=width, dtype=jnp.dtype(dtype)),
        stages=tuple(stages),
        merges=tuple(merges),
        embed_norm=norm,
        norm=norm,
        dropout=dropout,
    )
    return Classifier(encoder, classes)
