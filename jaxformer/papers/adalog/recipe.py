"""The recipe of a config: an image classifier, trained or imported, calibrated by AdaLog."""

from __future__ import annotations

from ml_collections import ConfigDict

from jaxformer.compress.compressor import Calibrated, bits_of
from jaxformer.papers.adalog.model import rules
from jaxformer.papers.adalog.search import AdaLogSearch
from jaxformer.recipe import Recipe
from jaxformer.setups import post_training


def build(config: ConfigDict) -> Recipe:
    """Phases "train", "outliers" and "calibrate"."""
    quantised = rules(config.bits.weights, config.bits.activations)
    return post_training.recipe(config, quantised, AdaLogSearch)


def compressor(argument: str) -> Calibrated:
    """Calibration to the bits of "w4a4"."""
    return Calibrated(rules(*bits_of(argument)), AdaLogSearch)
