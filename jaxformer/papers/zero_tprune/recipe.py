"""The recipe of a config: a plain ViT, trained or imported, that is evaluated with fewer tokens."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from jaxformer.compress.intercepted import Intercepted
from jaxformer.compress.tokens import kept_positions
from jaxformer.data.base import DeviceData
from jaxformer.data.sources.imagenet import imagenet
from jaxformer.data.sources.shapes import Shapes, Standardized
from jaxformer.errors import ConfigError
from jaxformer.evaluation.evaluators import MeanEvaluator
from jaxformer.models.encoder import Classifier
from jaxformer.models.transformer import require
from jaxformer.nn.patch import split_patches
from jaxformer.papers.zero_tprune.methods import Layer, Options, pruned
from jaxformer.recipe import Batch, Data, Extra, InitFrom, LossOutput, Mean, Params, Phase, Recipe
from jaxformer.setups.imported import adopt
from jaxformer.setups.vision import classifier
from jaxformer.tasks.classify import ClassifyTask
from jaxformer.train.updates import GradientUpdate


def build(config: ConfigDict) -> Recipe:
    """Train the plain model, if `steps` says so; evaluate it whole and pruned.

    Pruning has no parameters and no training: the task of the recipe is the pruned model, that of
    its update the plain one. `init_from` names a run with a trained model; if that was imported,
    its `huggingface` describes the model, and is taken over into this config.
    """
    adopt(config)
    model = classifier(config)
    train, unseen = data(config)
    whole = ClassifyTask(model)
    part = PrunedTask(shortened(config, model))
    every = config.evaluate.every or "end"
    batches = (config.evaluate.batches or 8) if config.data.task == "shapes" else None
    evaluators = [
        MeanEvaluator(task, unseen, name, every, batches)
        for name, task in (("whole", whole), ("pruned", part))
    ]
    phase = Phase("train", config.steps, train, GradientUpdate.of(whole, config))
    source = InitFrom(config.init_from, fresh=config.fresh) if config.init_from else None
    return Recipe(part, [phase], evaluators, init_from=source, unit="images")


def shortened(config: ConfigDict, model: Classifier) -> Intercepted:
    """The model with the pruning layers of the config."""
    layers = []
    for row in config.prune.layers:
        if len(row) != 4:
            raise ConfigError(
                f"prune.layers: {row} must be four numbers: after which block, the share that is "
                "kept, the number removed before, votes"
            )
        layers.append(Layer(*row))
    names = [field.name for field in dataclasses.fields(Options)]
    return pruned(model, layers, Options(**{name: config.prune[name] for name in names}))


def data(config: ConfigDict) -> tuple[Data, Data]:
    """Images to train and to evaluate on: shapes on textures, or folders like ImageNet's."""
    fields, rows = config.data, config.batch_size
    require("data.task", fields.task, ("shapes", "folder"))
    if fields.task == "folder":
        limit = config.evaluate.batches or None
        return imagenet(fields.root, fields.size, rows, config.seed, limit)
    shapes = Shapes(fields.size)
    if fields.classes != shapes.classes:
        raise ConfigError(f"data.classes={fields.classes}: there are {shapes.classes} shapes")
    made = Standardized(shapes)
    return DeviceData(made, rows, config.seed), DeviceData(made, rows, config.seed + 2**31)


@dataclasses.dataclass(frozen=True)
class PrunedTask(ClassifyTask):
    """`ClassifyTask` of a model that drops tokens.

    Where a batch has the "mask" (B, H, W) of what an image is about, the metric "recall" is the
    share of patches with a pixel of it that are left at the end.
    """

    def loss(
        self, params: Params, extra: Extra, batch: Batch, *, key: jax.Array, train: bool
    ) -> LossOutput:
        output = super().loss(params, extra, batch, key=key, train=train)
        if "mask" not in batch:
            return output
        recall = self.recall(params, batch)
        weights = jnp.asarray(batch.get("weight", jnp.ones(recall.shape)))
        return output._replace(metrics={**output.metrics, "recall": Mean.of(recall, weights)})

    def recall(self, params: Params, batch: Batch) -> jax.Array:
        """The share of each image's foreground patches that is left: (B,)."""
        about_BxN = foreground(self.model.model, batch["mask"])
        kept_BxM = self.kept(params, batch)
        if kept_BxM is None:
            return jnp.ones(len(about_BxN))
        protected = dict(self.model.model.encoder.arguments).get("class_tokens", 0)
        left = jnp.take_along_axis(about_BxN, kept_BxM[:, protected:] - protected, axis=1)
        return left.sum(1) / jnp.maximum(about_BxN.sum(1), 1)

    def kept(self, params: Params, batch: Batch) -> jax.Array | None:
        """Which tokens of the embedding are left at the end: (B, M), None for all."""
        # The compiler finds that the pass for the logits is the same one.
        image = jnp.asarray(batch["image"])
        _, sown = self.model.apply({"params": params}, image, mutable=["intermediates"])
        encoder = sown.get("intermediates", {}).get("encoder", {})
        depth = len(dict(dict(self.model.model.encoder.arguments)["stack"].arguments)["blocks"])
        return kept_positions(encoder.get("stack", {}), depth)


def foreground(model: Classifier, mask_BxHxW: jax.Array) -> jax.Array:
    """Which patches have a pixel of the mask: (B, N)."""
    patch = dict(dict(model.encoder.arguments)["embed"].arguments)["patch"]
    return split_patches(jnp.asarray(mask_BxHxW)[..., None], patch).any(axis=(2, 3, 4))
