"""A spike-driven vision transformer with weights of few bits, taught by a network of floats."""

from ml_collections import ConfigDict

from jaxformer.config import base

PRESETS = ("tiny", "small", "paper", "paper_31m", "paper_55m")


def get_config(preset: str) -> ConfigDict:
    """A network of two stages on the digits; those of 15, 31 and 55 million on ImageNet."""
    config = base("qsd_transformer")
    config.model = {
        "bits": 4,  # of weights
        "levels": 4,  # D: spikes at once; 1 is a binary neuron
        "steps": 1,  # T, of time
        "leak": 0.0,  # of a membrane that remembers; 0: none
        "fgd": 0.2,  # weight of fine-grained distillation; 0: none
        "label_smoothing": 0.1,
        # With the paper's 1e-6, which is for 300 epochs, trainings of 400 steps differ more in what
        # being taught attention gains (.1 +- .6 points over nine; .2 +- .4 over eighteen with 0.1).
        "layer_scale": 0.1,
        "heads": 4,
        # One of each for every stage: a downsampling, then blocks.
        "widths": (16, 32),
        "kinds": ("conv", "attention"),
        "depths": (1, 2),
        "sizes": (3, 3),
        "strides": (2, 2),
        "dtype": "float32",
    }
    config.data = {
        "root": "",  # has train/<class>/* and val/<class>/*; none: scikit-learn's digits
        "size": 16,
        "classes": 10,
        "images": 0,  # of the digits: how many to train on, the others are tested on; 0: 1437
    }
    config.teacher_steps = 400
    config.step_rate = 0.1  # the learning rate of steps of weights, of that of all else
    config.optim.update(learning_rate=4e-3, warmup_steps=20, weight_decay=0.05)
    config.update({"steps": 400, "batch_size": 32})
    if preset == "tiny":
        config.update({"steps": 30, "teacher_steps": 10, "batch_size": 32})
        config.model.depths = (1, 1)
        # A block with less would not be seen in so few steps, and its lesson not learnt.
        config.model.update({"layer_scale": 0.5, "fgd": 0.01, "label_smoothing": 0.0})
        config.model.bits = 8
        config.optim.update(learning_rate=1e-2, warmup_steps=15, clip=0.0)
        config.evaluate.batches = 4
    elif preset.startswith("paper"):
        paper(config, preset)
    return config


def paper(config: ConfigDict, preset: str) -> None:
    """300 epochs of ImageNet-1k in batches of 1568, LAMB."""
    widths = {
        "paper": (64, 128, 256, 360),
        "paper_31m": (96, 192, 384, 480),
        "paper_55m": (128, 256, 512, 640),
    }[preset]
    config.model.update({"widths": (widths[0] // 2, *widths), "heads": 8})
    config.model.update({"kinds": ("conv", "conv", "conv", "attention", "attention")})
    config.model.update({"depths": (1, 1, 2, 6, 2), "sizes": (7, 3, 3, 3, 3)})
    config.model.update({"strides": (2, 2, 2, 2, 1), "dtype": "bfloat16"})
    config.model.layer_scale = 1e-6
    config.data.update({"root": "imagenet", "size": 224, "classes": 1000})
    epoch = 817
    config.update({"steps": 300 * epoch, "teacher_steps": 300 * epoch, "batch_size": 1568})
    config.optim.update(name="lamb", learning_rate=6e-4 * 1568 / 256, warmup_steps=15 * epoch)
    config.optim.update(final=2.7e-4, clip=1.0)
    config.step_rate = 1.0  # LAMB's are of the size of what they change
    config.gradient.ema = 0.99996
    config.evaluate.every = epoch
    config.fit.update(log_every=100, checkpoint_every=epoch)
