"""The recipe of a config: an image classifier, trained or imported, calibrated by DopQ-ViT."""

from __future__ import annotations

import dataclasses
from typing import Any

from ml_collections import ConfigDict

from jaxformer.compress.compressor import Calibrated, bits_of, steps_of
from jaxformer.compress.reconstruction import Reconstruction, mean_error
from jaxformer.papers.dopq_vit.model import DopQ, rules
from jaxformer.recipe import Recipe
from jaxformer.setups import post_training

LOSSES: dict[str, Any] = {"loss": mean_error, "head_loss": mean_error}
FLOAT_SHARE = 0.5  # of a block's inputs (QDrop)


@dataclasses.dataclass(frozen=True)
class Procedure:
    """`DopQ` with these choices, of any parameters."""

    statistic: str = "median"
    refit: bool = False

    def __call__(self, params: Any) -> DopQ:
        return DopQ(params, self.statistic, self.refit)


def build(config: ConfigDict) -> Recipe:
    """Phases "train", "outliers", "calibrate" and, with `reconstruct.steps`, "reconstruct".

    Raises:
        ConfigError: an unknown form of the tangent or statistic of the channels.
    """
    model = config.model
    quantised = rules(config.bits.weights, config.bits.activations, model.form)
    procedure = Procedure(model.statistic, model.refit)
    procedure({})  # refuses an unknown statistic before anything is trained
    how = post_training.reconstruction_of(config, **LOSSES)
    return post_training.recipe(config, quantised, procedure, how)


def compressor(argument: str) -> Calibrated:
    """Calibration to the bits of "w4a4", by the symmetric tangent and medians of channels.

    "w4a4r200" reconstructs every block in 200 steps after it.
    """
    bits, steps = steps_of(argument)
    how = Reconstruction.of(steps, float_share=FLOAT_SHARE, **LOSSES) if steps else None
    return Calibrated(rules(*bits_of(bits)), Procedure(), how)
