"""A classifier of images, trained, then made binary: its attention first, its MLPs afterwards."""

from ml_collections import ConfigDict

from jaxformer.config import base
from jaxformer.setups.fields import image_classifier

PRESETS = ("tiny", "small", "paper", "paper_deit_b", "paper_swin_t")


def get_config(preset: str) -> ConfigDict:
    """A ViT on the digits; DeiT-T, DeiT-B or Swin-T on ImageNet for `paper*`."""
    config = base("bivit")
    image_classifier(config)
    config.model.update({"depth": 3, "dropout": 0.1})
    config.model.kind = "vit"  # vit | swin, which has the four fields below and no `heads`
    config.model.depths = (2, 2, 6, 2)
    config.model.stage_heads = (3, 6, 12, 24)
    config.model.window = 7
    config.model.schedule = "cross_layer"  # cross_layer | one_stage | attention, MLPs float
    config.model.attention = "sab"  # sab | optimal | positive (BiBERT's)
    config.model.beta = 0.25  # sab: of a row's largest probability, the least that counts as 1
    config.model.scale = "learned"  # of weights: learned | mean
    config.model.mlp_inputs = "float"  # float (1/32) | binary (1/1)
    config.data.root = ""  # of ImageNet's layout, in place of `train` and `test`
    config.float_steps = 2400
    config.mlp_steps = 300  # of the second stage; `steps` are those of the first
    # The learning rate of binary stages, of that before them. At the whole rate masks differ by a
    # point, at this one by 7 to 8.
    config.rate_scale = 0.3
    config.optim.update(learning_rate=2e-3, warmup_steps=20, weight_decay=0.3)  # decay: float alone
    config.update({"steps": 100, "batch_size": 32})
    if preset == "tiny":
        config.update({"float_steps": 40, "steps": 30, "mlp_steps": 30, "batch_size": 16})
        config.model.update({"width": 32, "depth": 2, "hidden": 64, "dropout": 0.0})
        config.optim.warmup_steps = 5
        config.evaluate.batches = 4
    elif preset.startswith("paper"):
        paper(config, preset)
    return config


def paper(config: ConfigDict, preset: str) -> None:
    """150 epochs of ImageNet-1k for each stage; 512 images in a batch are a choice."""
    sizes, run = {
        "paper": ({"width": 192, "depth": 12, "heads": 3, "hidden": 768, "patch": 16}, "deit_t"),
        "paper_deit_b": (
            {"width": 768, "depth": 12, "heads": 12, "hidden": 3072, "patch": 16},
            "deit_b",
        ),
        "paper_swin_t": ({"kind": "swin", "width": 96, "patch": 4}, "swin_t"),
    }[preset]
    config.model.update(sizes)
    config.model.update({"dtype": "bfloat16", "dropout": 0.0})
    config.data.update({"root": "imagenet", "size": 224, "classes": 1000})
    config.init_from = f"runs/{run}"  # `jaxformer import` makes it of a DeiT
    epoch = 2502
    config.update({"float_steps": 0, "steps": 150 * epoch, "mlp_steps": 150 * epoch})
    config.batch_size = 512
    config.optim.update(learning_rate=5e-4, warmup_steps=5 * epoch, clip=0.0)
    config.optim.weight_decay = 0.0
    config.rate_scale = 1.0
    config.evaluate.every = epoch
    config.fit.update(log_every=100, checkpoint_every=epoch)
