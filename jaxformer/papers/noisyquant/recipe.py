"""The recipe of a config: an image classifier, trained or imported, with noisy inputs."""

from __future__ import annotations

import dataclasses
from typing import Any

from ml_collections import ConfigDict

from jaxformer.compress.compressor import Calibrated, bits_of
from jaxformer.papers.noisyquant.model import NoisyQuant, rules
from jaxformer.recipe import Recipe
from jaxformer.setups import post_training


@dataclasses.dataclass(frozen=True)
class Procedure:
    """`NoisyQuant` with these choices, of any parameters."""

    shift: bool = True
    noise: bool = True
    seed: int = 0

    def __call__(self, params: Any) -> NoisyQuant:
        return NoisyQuant(params, self.shift, self.noise, self.seed)


def build(config: ConfigDict) -> Recipe:
    """Phases "train", "outliers" and "calibrate"."""
    noise = config.noise
    procedure = Procedure(noise.search_shift, noise.search_noise, noise.seed)
    quantised = rules(config.bits.weights, config.bits.activations)
    return post_training.recipe(config, quantised, procedure)


def compressor(argument: str) -> Calibrated:
    """Calibration to the bits of "w6a6", with both searches."""
    return Calibrated(rules(*bits_of(argument)), Procedure())
