"""A multi-head ViT, converted to grouped heads and trained on, key-driven or a control."""

from ml_collections import ConfigDict

from jaxformer.config import base
from jaxformer.setups.fields import image_classifier

PRESETS = ("tiny", "small", "paper")


def get_config(preset: str) -> ConfigDict:
    """A ViT on the digits, trained, converted and up-trained."""
    config = base("key_driven_gqa")
    image_classifier(config)
    config.model.update({"heads": 8, "hidden": 128, "patch": 4, "pool": "mean"})
    config.model.update(
        {
            "scheme": "dgqa_diff",  # gqa | kdgqa | dgqa_diff | dgqa_ema | pgqa
            "kv_heads": 4,
            "window": 30,  # DGQA: forward passes between two splits
            "epoch": 0,  # after which DGQA's counter restarts, as the authors' does; 0: never
            "by_batch": False,  # DGQA follows the batch in evaluation, as the authors' does
        }
    )
    config.data.size = 16
    config.multi_head_steps = 1200
    # Many small batches make more of three epochs; the rate is of that before conversion.
    config.up_train = {"batch_size": 8, "rate_scale": 1.0}
    # Muon with decay: of Adam's models schemes were up to 3.5 points below the multi-head one.
    config.optim.update(name="muon", learning_rate=5e-3, weight_decay=0.05, clip=1.0)
    config.optim.update(warmup_steps=20, schedule="cosine")
    config.update({"steps": 540, "batch_size": 32})  # three epochs
    if preset == "tiny":
        config.update({"steps": 40, "multi_head_steps": 30, "batch_size": 8})
        config.model.update({"width": 32, "depth": 2, "heads": 4, "kv_heads": 2, "hidden": 64})
        config.model.window = 10
        config.up_train.batch_size = 8
        config.optim.warmup_steps = 5
        config.evaluate.batches = 4
    elif preset == "paper":
        paper(config)
    return config


def paper(config: ConfigDict) -> None:
    """ViT-L/16 at 224, fine-tuned for five epochs of CIFAR-100; name its folders of images."""
    config.model.update({"width": 1024, "depth": 24, "heads": 16, "kv_heads": 8, "hidden": 4096})
    config.model.update({"patch": 16, "pool": "token", "window": 300, "dtype": "bfloat16"})
    config.data.update({"train": "cifar100/train", "test": "cifar100/test"})
    config.data.update({"size": 224, "classes": 100})
    config.optim.update(name="adamw", learning_rate=1e-5, weight_decay=0.0, warmup_steps=0)
    config.optim.update(schedule="constant", clip=0.0)
    config.update({"multi_head_steps": 0, "steps": 7815, "batch_size": 32})
    config.up_train = {"batch_size": 32, "rate_scale": 1.0}
