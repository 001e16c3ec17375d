"""URPE on its two synthetic tasks."""

from ml_collections import ConfigDict

from jaxformer.config import base

PRESETS = ("tiny", "small", "paper")


def get_config(preset: str) -> ConfigDict:
    """Position identification; `--config.data.task=even` is the other task."""
    config = base("urpe")
    config.model = {
        "position": "urpe",  # urpe | rpe | none
        "offsets": "unique",  # unique | buckets
        "buckets": 64,
        "longest": 128,
        "shared": True,  # one pair of tables for all layers
        "width": 64,
        "depth": 3,
        "heads": 4,
        "hidden": 256,
        "dropout": 0.0,
        "scan": False,
        "remat": "none",
        "dtype": "float32",
    }
    config.data = {
        "task": "position",  # position | even
        "length": 32,
        "vocabulary": 64,
        "identical": False,  # one token for a whole sequence
        "ignore_first": False,  # as the authors' code scores positions
    }
    config.optim.update(learning_rate=2e-3, warmup_steps=100, schedule="linear", clip=0.0)
    config.update({"steps": 400, "batch_size": 32})
    if preset == "tiny":
        config.update({"steps": 60, "batch_size": 8})
        config.model.update({"width": 32, "depth": 2, "heads": 2, "hidden": 64})
        config.data.length = 16
        config.optim.warmup_steps = 5
        config.evaluate.batches = 2
    elif preset == "paper":
        config.update({"steps": 40_000, "batch_size": 128})
        config.model.update({"width": 768, "heads": 12, "hidden": 3072, "dtype": "bfloat16"})
        config.data.update({"length": 128, "vocabulary": 10_000})
        config.optim.update(learning_rate=7e-5, warmup_steps=6000)
    return config
