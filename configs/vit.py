"""The plain ViT: scikit-learn's digits, or DeiT-S's sizes on folders of images."""

from ml_collections import ConfigDict

from jaxformer.config import base
from jaxformer.setups.fields import deit_s, image_classifier, regularised

PRESETS = ("tiny", "small", "deit_s")


def get_config(preset: str) -> ConfigDict:
    """Digits enlarged to 16 x 16 in 64 patches, so that there are tokens to drop."""
    config = base("vit")
    image_classifier(config)
    config.data.size = 16
    config.steps = 1500
    regularised(config, preset)
    if preset == "tiny":
        config.steps = 60
    elif preset == "deit_s":
        deit_s(config)
        config.update({"steps": 375_300, "batch_size": 1024})  # 300 epochs
        config.optim.update(learning_rate=1e-3, warmup_steps=6255, weight_decay=0.05)
    return config
