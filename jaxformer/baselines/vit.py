"""The plain ViT as an image classifier: on digits, or on folders of images."""

from __future__ import annotations

from ml_collections import ConfigDict

from jaxformer.evaluation.evaluators import MeanEvaluator
from jaxformer.recipe import InitFrom, Phase, Recipe
from jaxformer.setups import vision
from jaxformer.setups.imported import adopt
from jaxformer.tasks.classify import ClassifyTask
from jaxformer.train.updates import GradientUpdate


def build(config: ConfigDict) -> Recipe:
    """Train on images and their labels; `init_from` begins with another run's parameters."""
    adopt(config)
    task = ClassifyTask(vision.classifier(config))
    train, test = vision.images(config)
    phase = Phase("train", config.steps, train, GradientUpdate.of(task, config))
    evaluator = MeanEvaluator(task, test, "test", config.evaluate.every or "end")
    source = InitFrom(config.init_from, fresh=config.fresh) if config.init_from else None
    return Recipe(task, [phase], [evaluator], init_from=source, unit="images")
