"""A ViT, trained or imported, and its calibration to few bits with noise in its inputs."""

from ml_collections import ConfigDict

from jaxformer.config import base
from jaxformer.setups.fields import post_training

PRESETS = ("tiny", "small", "paper")


def get_config(preset: str) -> ConfigDict:
    """A ViT of digits with outliers, or DeiT-S of ImageNet at 6 bits."""
    config = base("noisyquant")
    post_training(config, preset)
    config.noise = {"search_shift": True, "search_noise": True, "seed": 0}
    if preset == "paper":
        config.bits = {"weights": 6, "activations": 6}
        config.calibration.images = 256
    return config
