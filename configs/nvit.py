"""NViT: a ViT pruned to a latency while it trains, made dense and fine-tuned; or a ReViT."""

from ml_collections import ConfigDict

from jaxformer.config import base

PRESETS = ("tiny", "small", "paper", "revit_t", "revit_s")


def get_config(preset: str) -> ConfigDict:
    """The digits, pruned to half of the latency."""
    config = base("nvit")
    config.model = {
        "width": 48,
        "depth": 4,
        "heads": 4,
        "hidden": 192,
        "patch": 2,
        "dropout": 0.0,
        "drop_path": 0.0,
        "label_smoothing": 0.0,
        "remat": "none",
        "dtype": "float32",
    }
    # A wider model, or one that trains on for longer, makes up for whatever was removed: of width
    # 64, with 900 and 300 steps, random groups came within 2 points.
    config.prune = {
        "steps": 450,
        "ranking": "hessian",  # hessian | magnitude (of each list alike) | random
        "target": 0.5,  # of the latency of the whole model
        "interval": 5,  # steps between two rounds
        "groups_per_round": 1.0,
        "groups": {"embedding": 4, "head": 1, "qk": 2, "value": 2, "mlp": 8},  # units of one
        # What a block's whole latency is worth; 0: score alone. The paper's 4.04e-5 is for
        # scores of ImageNet's.
        "eta": 3e-2,
        "latency_table": "",  # an .npz of jaxformer.analyze.latency; none: the formula
        "norm": "masked",  # masked | legacy: over removed channels too, as the authors' code
        "optimizer": "adamw",
        "learning_rate": 5e-4,
        "schedule": "constant",
        "coefficient": 1e3,  # of L_full, whose mean is over classes: 1e5 for 1000 of them
        "temperature": 3.0,
    }
    config.fine_tune = {
        "steps": 150,
        "optimizer": "adamw",
        "learning_rate": 1e-3,
        "schedule": "cosine",
        "coefficient": 1e3,
        "temperature": 20.0,
        "ema": 0.0,
    }
    config.dense_from = ""  # the folder of a pruned run: go on with what it has left
    config.widths = ()  # (embedding, ((heads, qk, value, mlp), ...)): found, or to train anew
    config.rule = ""  # revit: widths by the rule, of model.width
    config.data = {
        "task": "digits",  # digits | folder
        "root": "imagenet",  # of folder: has train/<class>/* and val/<class>/*
        "size": 8,
        "classes": 10,
    }
    config.huggingface = ConfigDict()  # of an imported ViT or DeiT its config.json
    config.init_from = ""  # the run of a trained model, such as `jaxformer import` makes
    config.fresh = r"(?!)"  # its parameters that begin anew
    config.optim.update(name="muon", learning_rate=5e-3, warmup_steps=50, weight_decay=0.05)
    config.update({"steps": 1200, "batch_size": 32})
    if preset == "tiny":
        config.update({"steps": 40, "batch_size": 8})
        config.model.update({"width": 32, "depth": 2, "heads": 4, "hidden": 64})
        config.prune.update({"steps": 60, "interval": 2, "coefficient": 50.0})
        config.fine_tune.steps = 20
        config.optim.warmup_steps = 5
        config.evaluate.batches = 4
    elif preset == "paper":
        paper(config)
    elif preset.startswith("revit"):
        images(config)
        config.rule = "revit"
        config.model.width = 176 if preset == "revit_t" else 384
        config.model.heads = 11 if preset == "revit_t" else 6
        config.update({"steps": 375_300, "batch_size": 1024})  # 300 epochs
        config.optim.update(learning_rate=1e-3, warmup_steps=6255, clip=0.0)
    return config


def images(config: ConfigDict) -> None:
    """ImageNet at 224 by DeiT's recipe."""
    config.model.update({"depth": 12, "patch": 16, "label_smoothing": 0.1, "drop_path": 0.1})
    config.model.dtype = "bfloat16"
    config.data.update({"task": "folder", "size": 224, "classes": 1000})
    config.optim.update(name="adamw", weight_decay=0.05)


def paper(config: ConfigDict) -> None:
    """DeiT-B to 0.54 of its latency (NViT-B); name the run of the weights in `init_from`."""
    images(config)
    config.model.update({"width": 768, "heads": 12, "hidden": 3072, "drop_path": 0.0})
    config.prune.update({"steps": 125_100, "target": 0.54, "interval": 100})
    config.prune.groups = {"embedding": 16, "head": 2, "qk": 8, "value": 8, "mlp": 16}
    config.prune.update({"groups_per_round": 2.0, "learning_rate": 1e-4, "coefficient": 1e5})
    config.prune.eta = 4.04e-5
    config.fine_tune.update({"steps": 750_600, "learning_rate": 2e-4, "coefficient": 1e5})
    config.fine_tune.ema = 0.99996
    config.update({"steps": 0, "batch_size": 512})
