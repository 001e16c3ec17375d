"""The recipe of a config: an image classifier, trained or imported, calibrated by DopQ-ViT."""

from __future__ import annotations

import dataclasses
from typing import Any

from ml_collections import ConfigDict

from jaxformer.compress.compressor import Calibrated, bits_of
from jaxformer.papers.dopq_vit.model import DopQ, rules
from jaxformer.recipe import Recipe
from jaxformer.setups import post_training


@dataclasses.dataclass(frozen=True)
class Procedure:
    """`DopQ` with these choices, of any parameters."""

    statistic: str = "median"
    refit: bool = False

    def __call__(self, params: Any) -> DopQ:
        return DopQ(params, self.statistic, self.refit)


def build(config: ConfigDict) -> Recipe:
    """Phases "train", "outliers" and "calibrate".

    Raises:
        ConfigError: an unknown form of the tangent or statistic of the channels.
    """
    model = config.model
    quantised = rules(config.bits.weights, config.bits.activations, model.form)
    procedure = Procedure(model.statistic, model.refit)
    procedure({})  # refuses an unknown statistic before anything is trained
    return post_training.recipe(config, quantised, procedure)


def compressor(argument: str) -> Calibrated:
    """Calibration to the bits of "w4a4", by the symmetric tangent and medians of channels."""
    return Calibrated(rules(*bits_of(argument)), Procedure())
