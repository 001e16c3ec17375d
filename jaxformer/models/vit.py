"""The Vision Transformer (Dosovitskiy et al. 2020, arXiv 2010.11929) as a classifier."""

from __future__ import annotations

from jaxformer.errors import ConfigError
from jaxformer.models.encoder import Classifier, Encoder
from jaxformer.models.transformer import Transformer, require
from jaxformer.nn.heads import FirstToken, MeanPool
from jaxformer.nn.make import Make
from jaxformer.nn.patch import PatchEmbed

POOLS = {"token": FirstToken, "mean": MeanPool}


def vit(
    trunk: Transformer,
    *,
    image_size: int,
    patch: int,
    classes: int,
    pool: str = "token",
    mixer: Make | None = None,
    scheme: Make | None = None,
) -> Classifier:
    """Square images (B, image_size, image_size, channels) to classes.

    `pool` is "token" (a class token in front of the patches) or "mean" (over the patches).

    Raises:
        ConfigError: the patch does not divide the image, or there is no such pool.
    """
    require("model.pool", pool, POOLS)
    if patch < 1 or image_size % patch:
        raise ConfigError(f"model.patch={patch}: must divide model.image_size={image_size}")
    class_tokens = 1 if pool == "token" else 0
    encoder = Make(
        Encoder,
        embed=Make(PatchEmbed, patch=patch, width=trunk.width, dtype=trunk.compute_dtype),
        stack=trunk.stack(mixer),
        position=trunk.stream_position((image_size // patch) ** 2 + class_tokens),
        scheme=scheme,
        norm=trunk.final_norm(),
        class_tokens=class_tokens,
        dropout=trunk.dropout,
    )
    return Classifier(encoder, classes, Make(POOLS[pool]))
