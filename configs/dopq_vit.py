"""A ViT, trained or imported, and its calibration to few bits by DopQ-ViT."""

from ml_collections import ConfigDict

from jaxformer.config import base
from jaxformer.setups.fields import post_training, reconstruction

PRESETS = ("tiny", "small", "paper")


def get_config(preset: str) -> ConfigDict:
    """A ViT of digits with outliers, or DeiT-S of ImageNet."""
    config = base("dopq_vit")
    post_training(config, preset)
    reconstruction(config, preset, float_share=0.5)
    config.model.form = "sym"  # of the tangent: sym | atan | auto, the better for each layer
    config.model.statistic = "median"  # of the channels' scales: median | mad | search | mean
    config.model.refit = False  # calibrate inputs again once their channels share a scale
    return config
