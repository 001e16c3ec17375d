"""The recipe of a config: an image classifier, trained or imported, calibrated by AdaLog."""

from __future__ import annotations

from ml_collections import ConfigDict

from jaxformer.compress.compressor import Calibrated, bits_of, steps_of
from jaxformer.compress.reconstruction import Reconstruction
from jaxformer.papers.adalog.model import rules
from jaxformer.papers.adalog.search import AdaLogSearch
from jaxformer.recipe import Recipe
from jaxformer.setups import post_training


def build(config: ConfigDict) -> Recipe:
    """Phases "train", "outliers", "calibrate" and, with `reconstruct.steps`, "reconstruct"."""
    quantised = rules(config.bits.weights, config.bits.activations)
    how = post_training.reconstruction_of(config)
    return post_training.recipe(config, quantised, AdaLogSearch, how)


def compressor(argument: str) -> Calibrated:
    """Calibration to the bits of "w4a4"; "w4a4r200" reconstructs every block in 200 steps."""
    bits, steps = steps_of(argument)
    how = Reconstruction.of(steps) if steps else None
    return Calibrated(rules(*bits_of(bits)), AdaLogSearch, how)
