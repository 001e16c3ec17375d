"""3DTRL: a ViT whose tokens learn where in space they are."""

from ml_collections import ConfigDict

from jaxformer.config import base

PRESETS = ("tiny", "small", "paper", "films")


def get_config(preset: str) -> ConfigDict:
    """`small` classifies rendered objects from unseen azimuths, `films` aligns two views of one
    happening, `paper` is DeiT-S on ImageNet.
    """
    config = base("tokens3d")
    config.model = {
        "layer": "tokens3d",  # tokens3d | concat | control (as many parameters) | none
        "at": 2,  # the block it stands before
        "source": "both-sep",  # of the camera: both-sep | both-avg | cls
        "depth": True,  # or whole points are predicted
        "patch": 8,
        "width": 64,
        "depth_blocks": 6,
        "heads": 4,
        "hidden": 128,
        "embed_dim": 32,  # of films: what is compared
        "label_smoothing": 0.0,
        "dropout": 0.0,
        "drop_path": 0.0,
        "remat": "none",
        "dtype": "float32",
    }
    config.data = {
        "task": "views",  # views | films | folder | ftpv
        "image_size": 32,
        "seen": (0.0, 45.0),  # azimuths to either side, degrees, that are trained on
        "unseen": (45.0, 90.0),
        "frames": 40,  # of a film
        "near": 3,  # frames within which a moment is the same
        "root": "",  # of folder: ImageNet's; of ftpv: a data set's
        "classes": 1000,  # of folder
        "train_views": 6,  # of ftpv: the first so many third-person views
    }
    config.optim.update(learning_rate=1e-3, warmup_steps=50, weight_decay=0.05, final=0.05)
    config.update({"steps": 400, "batch_size": 64})
    config.evaluate.batches = 64
    if preset == "tiny":
        config.update({"steps": 40, "batch_size": 8})
        config.model.update({"width": 32, "depth_blocks": 3, "heads": 2, "hidden": 64})
        config.optim.warmup_steps = 5
        config.evaluate.batches = 2
    elif preset == "films":
        config.update({"steps": 300, "batch_size": 16})
        config.data.task = "films"
        config.evaluate.batches = 1
    elif preset == "paper":
        config.update({"steps": 388_000, "batch_size": 1024})
        config.model.update({"width": 384, "depth_blocks": 12, "heads": 6, "hidden": 1536})
        config.model.update({"patch": 16, "at": 4, "dtype": "bfloat16", "label_smoothing": 0.1})
        config.data.update({"task": "folder", "image_size": 224, "root": "imagenet"})
        config.optim.update(learning_rate=1.5e-3, warmup_steps=19_000, weight_decay=0.3)
        config.optim.final = 0.01
        config.gradient.ema = 0.99992
        config.evaluate.update({"every": 12_500, "batches": 0})
    return config
