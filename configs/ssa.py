"""SSA: digits pixel by pixel, and a language model, trained on keys drawn anew."""

from ml_collections import ConfigDict

from jaxformer.config import base

PRESETS = ("tiny", "small", "paper", "text")


def get_config(preset: str) -> ConfigDict:
    """`small` classifies digits with an unbiased draw; `text` is a language model with a local one;
    `paper` is the authors' setting for bytes of enwik8.
    """
    config = base("ssa")
    config.model = {
        "draw": "unbiased",  # unbiased | local | dropout | dense
        "keep": 0.25,  # unbiased: the share of keys
        "window": 64,  # local: queries and keys of a window
        "spread": -1.0,  # local: of keys, in positions; -1: the window
        "rate": 0.3,  # dropout: of keys, by example
        "width": 64,
        "depth": 3,
        "heads": 4,
        "hidden": 128,
        "mlp": "gelu",
        "norm": "layernorm",
        "position": "learned",
        "dropout": 0.0,
        "scan": False,
        "remat": "none",
        "dtype": "float32",
    }
    config.data = {
        "task": "digits",  # digits | text
        "images": 500,  # of digits: how many to train on, 0: all
        "text": "python-stdlib",  # or a glob of text files
        "tokenizer": "bytes",
        "vocabulary": 257,
        "validation": 0.05,
        "length": 256,
    }
    config.dense = {"share": 0.3, "rate_scale": 0.5}  # of the steps, with all keys, at the end
    config.ensemble = {"passes": 20}  # at evaluation; 0: none
    config.sample = {"prompt": "def ", "length": 200, "temperature": 0.7}
    config.optim.update(learning_rate=2e-3, warmup_steps=50, weight_decay=0.05, final=0.1)
    config.update({"steps": 700, "batch_size": 32})
    if preset == "tiny":
        config.update({"steps": 40, "batch_size": 8})
        config.model.update({"width": 32, "depth": 2, "heads": 2, "hidden": 64})
        config.data.images = 100
        config.optim.warmup_steps = 5
        config.ensemble.passes = 3
        config.evaluate.batches = 4
    elif preset in ("text", "paper"):
        config.update({"steps": 300, "batch_size": 16})
        config.data.task = "text"
        config.model.draw = "local"
        # Nearer keys: .007 nats below dense training, seed 0; at the window's spread .022 above.
        config.model.spread = 16.0
        config.dense.share = 0.15
        config.ensemble.passes = 0
        config.optim.weight_decay = 0.1
        config.evaluate.batches = 32
        if preset == "paper":
            config.update({"steps": 400_000, "batch_size": 32})
            config.model.update({"width": 512, "depth": 12, "heads": 8, "hidden": 2048})
            config.model.update({"window": 256, "spread": -1.0, "dtype": "bfloat16", "scan": True})
            config.data.update({"length": 2048, "text": "enwik8"})
            config.optim.update(learning_rate=2.5e-4, warmup_steps=4000)
            config.evaluate.update({"every": 5000, "batches": 0})
    return config
