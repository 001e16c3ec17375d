"""The recipe of a config: a class-conditional DiT on scenes, images or cached latents."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
from ml_collections import ConfigDict

from jaxformer.data.base import Deferred, DeviceData, Epoch, IndexedData, Source
from jaxformer.data.sources.image import ImageFolder
from jaxformer.data.sources.latents import LatentCache
from jaxformer.data.sources.scenes import CLASSES, Scenes
from jaxformer.data.transforms import RandomFlip, RowSeed
from jaxformer.errors import ConfigError
from jaxformer.evaluation.evaluators import MeanEvaluator
from jaxformer.evaluation.frechet import FrechetDistance, RandomFeatures
from jaxformer.models.dit import DiT, dit
from jaxformer.models.transformer import require
from jaxformer.nn.attention import LogLength
from jaxformer.nn.grid import SCANS, Grid, layer_masks
from jaxformer.papers.ledit.model import positions
from jaxformer.recipe import Data, Evaluator, Phase, Recipe
from jaxformer.sampling.diffusion import named_sampler
from jaxformer.tasks.diffuse import ClassLabel, DiffusionTask, Latents, Pixels
from jaxformer.tasks.gaussian_diffusion import FixedVariance, GaussianDiffusion, LearnedRange
from jaxformer.tasks.noising import Process, RectifiedFlow
from jaxformer.train.updates import GradientUpdate

SOURCES = ("scenes", "images", "latents")


def build(config: ConfigDict) -> Recipe:
    """Train on examples of one size; evaluate the loss and, if asked for, the Fréchet distance."""
    task = diffusion_task(config)
    train, unseen, limit = datasets(config)
    every = config.evaluate.every or "end"
    evaluators: list[Evaluator] = [MeanEvaluator(task, unseen, "validation", every, limit)]
    if config.evaluate.frechet:
        rule = config.sample
        evaluators.append(
            FrechetDistance(
                task,
                unseen,
                RandomFeatures(),
                named_sampler(rule.sampler, rule.steps),
                examples=config.evaluate.frechet,
                guidance=rule.guidance,
                guided_channels=rule.guided_channels or None,
            )
        )
    update = GradientUpdate.of(task, config)
    phase = Phase("train", config.steps, train, update)
    return Recipe(task, [phase], evaluators, unit="images")


def diffusion_task(config: ConfigDict) -> DiffusionTask:
    """The network, the process and what the network is told."""
    data, diffusion = config.data, config.diffusion
    process = noising(diffusion)
    label = ClassLabel(data.classes, null=diffusion.drop > 0)
    return DiffusionTask(
        network(config, process.outputs(data.channels), label.labels),
        process,
        (label,),
        diffusion.drop,
        Latents() if data.source == "latents" else Pixels(),
    )


def noising(diffusion: ConfigDict) -> Process:
    """The process of a config's section `diffusion`."""
    require("diffusion.process", diffusion.process, ("ddpm", "flow"))
    if diffusion.process == "flow":
        return RectifiedFlow()
    variance = LearnedRange() if diffusion.learned_variance else FixedVariance()
    return GaussianDiffusion(diffusion.steps, diffusion.schedule, variance)


def token_grid(size: tuple[int, int], patch: int) -> Grid:
    """The grid of patches of an image.

    Raises:
        ConfigError: the patch does not divide it.
    """
    if patch < 1 or size[0] % patch or size[1] % patch:
        raise ConfigError(
            f"model.patch={patch}: must divide data.height={size[0]} and data.width={size[1]}"
        )
    return size[0] // patch, size[1] // patch


def network(config: ConfigDict, channels: int, labels: int) -> DiT:
    """The DiT of a config for its size; parameters fit any other size as well."""
    data, model = config.data, config.model
    require("model.scan_order", model.scan_order, SCANS)
    require("model.attn_scale", model.attn_scale, ("none", "sqrt_log"))
    grid = token_grid((data.height, data.width), model.patch)
    trained = token_grid((data.trained_height, data.trained_width), model.patch)
    told = positions(
        model.position,
        trained=trained,
        grid=grid,
        stretch=model.stretch,
        p_dilate=model.p_dilate,
        dilation=model.dilation,
        conv_init=model.conv_init,
        conv_norm=model.conv_norm,
    )
    names = ("width", "depth", "heads", "patch", "scan", "remat", "dtype")
    return dit(
        **{name: model[name] for name in names},
        channels=channels,
        labels=labels,
        masks=layer_masks(model.pattern, model.depth, SCANS[model.scan_order]),
        scale=LogLength(trained[0] * trained[1]) if model.attn_scale == "sqrt_log" else None,
        **told,
    )


def datasets(config: ConfigDict) -> tuple[Data, Data, int | None]:
    """Data to train on, unseen data, and how many of its batches are looked at (None: all)."""
    data = config.data
    require("data.source", data.source, SOURCES)
    limit = config.evaluate.batches or None
    if data.source == "scenes":
        if data.classes != CLASSES or data.channels != 3:
            raise ConfigError(f"data.classes={data.classes}: scenes have {CLASSES}, and 3 channels")
        rows = Scenes(data.height, data.width, data.checker)
        train = DeviceData(rows, config.batch_size, config.seed)
        return train, DeviceData(rows, config.batch_size, config.seed + 2**31), limit or 16
    row = {
        "image": ((data.height, data.width, data.channels), np.float32),
        "label": ((), np.int32),
        "seed": ((), np.uint32),
    }
    flip = (
        [] if data.source == "latents" else [RandomFlip()]
    )  # a latent's mirror image is no latent's

    def source(split: str) -> Source:
        if data.source == "latents":
            return LatentCache(data.folder, split)
        if data.height != data.width:
            raise ConfigError(f"data.height={data.height}: images are squares of data.width")
        return ImageFolder(f"{data.folder}/{split}", data.height)

    def train() -> Data:
        transforms = [*flip, RowSeed()]
        return IndexedData(source("train"), config.batch_size, config.seed, transforms)

    def unseen() -> Data:
        return Epoch(source("val"), config.batch_size, 0, [RowSeed()], limit)

    weighed = {**row, "weight": ((), np.float32)}
    of: Callable[..., Data] = functools.partial(Deferred, batch_size=config.batch_size)
    return of(train, row=row), of(unseen, row=weighed), None
