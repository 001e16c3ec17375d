"""Zero-TPrune: a plain ViT, trained or imported, evaluated whole and with fewer tokens."""

from ml_collections import ConfigDict

from jaxformer.config import base

PRESETS = ("tiny", "small", "paper")


def get_config(preset: str) -> ConfigDict:
    """Shapes on textures, half of the tokens dropped after the third of six blocks."""
    config = base("zero_tprune")
    config.model = {
        "width": 96,
        "depth": 6,
        "heads": 3,
        "hidden": 192,
        "patch": 4,
        "pool": "token",  # token | mean
        "dropout": 0.0,
        "scan": False,
        "remat": "none",
        "dtype": "float32",
    }
    config.prune = {
        # zero_tprune | importance | similarity | class_attention | random | none
        "method": "zero_tprune",
        # after which block, rho that the I-stage keeps, r that the S-stage removes, its votes
        "layers": ((3, 0.6, 10, 5),),
        "boost": True,  # the class token's first score is sqrt(N) times any other
        "aggregate": "eir_vhf",  # eir_vhf | eir | mean, of the scores of heads
        "restrict": True,  # the I-stage sees the graph of what the S-stage has left
        "feature": "key",  # key | query | value | before | after
        "metric": "cosine",  # cosine | dot | l1 | l2 | lp | linf
        "partition": "seq_u",  # seq_u | seq_i | alternate | random | none
        "seed": 0,  # of random
    }
    config.data = {
        "task": "shapes",  # shapes | folder
        "root": "imagenet",  # of folder: has train/<class>/* and val/<class>/*
        "size": 32,
        "classes": 8,
    }
    config.huggingface = ConfigDict()  # of an imported ViT or DeiT its config.json
    config.init_from = ""  # the run of a trained model, such as `jaxformer import` makes
    config.fresh = r"(?!)"  # its parameters that begin anew
    config.optim.update(name="muon", learning_rate=5e-3, warmup_steps=50)
    config.update({"steps": 1200, "batch_size": 32})
    if preset == "tiny":
        config.update({"steps": 60, "batch_size": 8})
        config.model.update({"width": 32, "depth": 4, "heads": 2, "hidden": 64})
        config.optim.warmup_steps = 5
        config.evaluate.batches = 2
    elif preset == "paper":
        paper(config)
    return config


def paper(config: ConfigDict) -> None:
    """DeiT-S/16 at 224, "Zero-TP-a": no training; name the run of the weights in `init_from`."""
    config.model.update({"width": 384, "depth": 12, "heads": 6, "hidden": 1536, "patch": 16})
    config.model.dtype = "bfloat16"
    config.prune.layers = (
        (1, 1.0, 10, 30),
        (3, 0.9, 10, 5),
        (6, 0.8, 10, 5),
        (9, 0.7, 10, 1),
        (11, 1.0, 10, 1),
    )
    config.data.update({"task": "folder", "size": 224, "classes": 1000})
    config.optim.update(name="adamw", learning_rate=1e-5, warmup_steps=0)
    config.update({"steps": 0, "batch_size": 256})
