"""L2ViT: the image classifier in its three sizes, and small ones on made images and on digits."""

from ml_collections import ConfigDict

from jaxformer.config import base

PRESETS = ("tiny", "small", "paper", "paper_small", "paper_base")


def get_config(preset: str) -> ConfigDict:
    """Made images with a local and a global cue; digits for `tiny`; ImageNet for `paper*`."""
    config = base("l2vit")
    config.model = {
        "widths": (16,),
        "depths": (2,),
        "heads": (2,),
        "window": 3,
        "mlp_ratio": 4.0,
        "blocks": "mixed",  # mixed | window | global
        "local": True,  # the concentration module
        "clamp": 100.0,  # of the denominators; 0: none
        "drop_path": 0.0,
        "label_smoothing": 0.0,
        "classes": 8,
        "dtype": "float32",
    }
    config.data = {
        "task": "cues",  # cues | digits | folder
        "image_size": 96,
        "size": 4000,  # of cues: images to train on
        "root": "imagenet",  # of folder: has train/<class>/* and val/<class>/*
    }
    config.optim.update(learning_rate=6e-3, warmup_steps=50, weight_decay=0.05)
    config.update({"steps": 900, "batch_size": 32})
    if preset == "tiny":
        config.update({"steps": 60, "batch_size": 16})
        config.model.update({"widths": (8, 16), "depths": (2, 2), "heads": (1, 2)})
        config.model.update({"window": 7, "classes": 10})
        config.data.update({"task": "digits", "image_size": 32})
        config.optim.update(learning_rate=1e-3, warmup_steps=5)
        config.evaluate.batches = 4
    elif preset.startswith("paper"):
        paper(config, preset)
    return config


def paper(config: ConfigDict, preset: str) -> None:
    """ImageNet-1k for 300 epochs; the rates at which T and S drop paths are a choice."""
    widths, depths, heads, drop = {
        "paper": ((96, 192, 384, 768), (2, 2, 6, 2), (3, 6, 12, 24), 0.1),
        "paper_small": ((96, 192, 384, 768), (2, 2, 18, 2), (3, 6, 12, 24), 0.3),
        "paper_base": ((128, 256, 512, 1024), (2, 2, 18, 2), (4, 8, 16, 32), 0.3),
    }[preset]
    config.model.update({"widths": widths, "depths": depths, "heads": heads, "drop_path": drop})
    config.model.update({"window": 7, "classes": 1000, "label_smoothing": 0.1})
    config.data.update({"task": "folder", "image_size": 224})
    config.update({"steps": 93_900, "batch_size": 4096})  # 313 steps an epoch
    config.optim.update(learning_rate=4e-3, warmup_steps=6260, final=2.5e-4)
    config.gradient.ema = 0.9999
    config.evaluate.every = 3130
    config.fit.update(log_every=100, checkpoint_every=3130)
