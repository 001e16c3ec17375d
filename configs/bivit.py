"""A classifier of images, trained, then made binary: its attention first, its MLPs afterwards."""

from ml_collections import ConfigDict

from jaxformer.config import base

PRESETS = ("tiny", "small", "paper", "paper_deit_b", "paper_swin_t")


def get_config(preset: str) -> ConfigDict:
    """A ViT on the digits; DeiT-T, DeiT-B or Swin-T on ImageNet for `paper*`."""
    config = base("bivit")
    config.model = {
        "schedule": "cross_layer",  # cross_layer | one_stage | attention (MLPs stay float)
        "attention": "sab",  # sab | optimal | positive (BiBERT's)
        "beta": 0.25,  # sab: of a row's largest probability, the least that counts as 1
        "scale": "learned",  # of weights: learned | mean
        "mlp_inputs": "float",  # float (1/32) | binary (1/1)
        "kind": "vit",  # vit | swin
        "width": 64,
        "depth": 3,  # of vit
        "heads": 4,
        "depths": (2, 2, 6, 2),  # of swin, by stage
        "stage_heads": (3, 6, 12, 24),
        "window": 7,
        "patch": 2,
        "dropout": 0.0,
        "drop_path": 0.0,
        "remat": "none",
        "dtype": "float32",
    }
    config.data = {
        "root": "",  # has train/<class>/* and val/<class>/*; none: scikit-learn's digits
        "image_size": 8,
        "classes": 10,
    }
    config.init_from = ""  # a run of the same model in full precision; then float_steps is 0
    config.fresh = r"(?!)"  # its parameters that begin anew: r"^head/" for other classes
    config.float_steps = 1500
    config.mlp_steps = 400  # of the second stage; `steps` are those of the first
    config.rate_scale = 1.0  # the learning rate of binary stages, of that before them
    config.optim.update(learning_rate=2e-3, warmup_steps=20, clip=1.0)
    config.update({"steps": 400, "batch_size": 32})
    if preset == "tiny":
        config.update({"float_steps": 40, "steps": 30, "mlp_steps": 30, "batch_size": 16})
        config.model.update({"width": 32, "depth": 2})
        config.optim.warmup_steps = 5
        config.evaluate.batches = 4
    elif preset.startswith("paper"):
        paper(config, preset)
    return config


def paper(config: ConfigDict, preset: str) -> None:
    """150 epochs of ImageNet-1k for each stage; 512 images in a batch are a choice."""
    sizes = {
        "paper": {"width": 192, "depth": 12, "heads": 3, "patch": 16},
        "paper_deit_b": {"width": 768, "depth": 12, "heads": 12, "patch": 16},
        "paper_swin_t": {"kind": "swin", "width": 96, "patch": 4},
    }[preset]
    config.model.update(sizes)
    config.model.update({"dtype": "bfloat16", "remat": "none"})
    config.data.update({"root": "imagenet", "image_size": 224, "classes": 1000})
    epoch = 2502
    config.init_from = f"runs/{preset.removeprefix('paper_') if '_' in preset else 'deit_t'}"
    config.update({"float_steps": 0, "steps": 150 * epoch, "mlp_steps": 150 * epoch})
    config.batch_size = 512
    config.optim.update(learning_rate=5e-4, warmup_steps=5 * epoch, clip=0.0)
    config.evaluate.every = epoch
    config.fit.update(log_every=100, checkpoint_every=epoch)
