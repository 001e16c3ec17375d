"""A ViT, trained or imported, and its calibration to few bits by AdaLog."""

from ml_collections import ConfigDict

from jaxformer.config import base
from jaxformer.setups.fields import post_training, reconstruction

PRESETS = ("tiny", "small", "paper")


def get_config(preset: str) -> ConfigDict:
    """A ViT of digits with outliers, or DeiT-S of ImageNet."""
    config = base("adalog")
    post_training(config, preset)
    reconstruction(config, preset, float_share=1.0)
    return config
