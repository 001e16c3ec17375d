"""Flowformer. `tiny`, `small` and `paper` are causal language models, the others classifiers."""

from ml_collections import ConfigDict

from jaxformer.config import base

PRESETS = ("tiny", "small", "paper", "recall", "listops", "digits")


def get_config(preset: str) -> ConfigDict:
    """A language model in three sizes; `recall`, which the claims are measured on; LRA's ListOps;
    a ViT for `digits`.
    """
    config = base("flowformer")
    config.model = {
        "mixer": "flow",  # flow | linear | softmax
        "clamp": 1.0,  # of the conserved outgoing flow; 0: none
        "compete": True,
        "allocate": True,
        "vocabulary": 257,
        "width": 128,
        "depth": 4,
        "heads": 4,
        "hidden": 512,
        "mlp": "gelu",
        "norm": "layernorm",
        "position": "learned",
        "dropout": 0.0,
        "scan": False,
        "remat": "none",
        "tied": True,
        "dtype": "float32",
    }
    config.data = {
        "task": "text",  # text | queries | recall | listops | digits
        "text": "python-stdlib",  # or a glob of text files
        "tokenizer": "bytes",  # or a tokenizer.json, or a SentencePiece .model
        "validation": 0.05,  # the tail of the text that is held out
        "length": 256,
        "pairs": 16,  # of queries and recall
        "key_count": 32,  # of recall: how many there are
        "value_count": 16,
        "asked": 0,  # positions that hold the question; 0: all that the pairs leave
        "size": 20_000,  # of listops: expressions
        "patch": 2,  # of digits
    }
    config.sample = {"prompt": "def ", "length": 200, "temperature": 0.7}
    config.optim.update(learning_rate=2e-3, warmup_steps=50, weight_decay=0.1, final=0.1)
    config.optim.clip = 1.0
    if preset == "tiny":
        config.update({"steps": 60, "batch_size": 8})
        config.model.update({"width": 32, "depth": 2, "heads": 2, "hidden": 64})
        config.data.length = 64
        config.optim.warmup_steps = 5
        config.sample.length = 40
        config.evaluate.update({"every": 30, "batches": 4})
    elif preset == "small":
        # 0.28 s a step on 2 CPU cores: the README's first command ends within 3 minutes.
        config.update({"steps": 360, "batch_size": 16})
        config.optim.learning_rate = 3e-3
        config.evaluate.update({"every": 120, "batches": 16})
        config.fit.checkpoint_every = 120
    elif preset == "paper":
        # WikiText-103 in the setting of fairseq's transformer_lm (appendix of the paper).
        config.update({"steps": 150_000, "batch_size": 64})
        config.gradient.accumulate = 16  # micro-batches of 4 x 512 tokens
        config.model.update({"vocabulary": 267_744, "width": 512, "depth": 6, "heads": 8})
        config.model.update({"hidden": 2048, "clamp": 5.0, "dropout": 0.1, "mlp": "relu"})
        config.model.update({"position": "sinusoidal", "dtype": "bfloat16"})
        config.data.update({"length": 512, "text": "wikitext-103/wiki.train.tokens"})
        config.optim.update(schedule="rsqrt", learning_rate=1e-3, warmup_steps=6000)
        config.optim.update(weight_decay=0.01, clip=0.0)
        config.evaluate.every = 5000
        config.fit.update(log_every=100, checkpoint_every=2000)
    elif preset == "recall":
        config.update({"steps": 800, "batch_size": 32})
        # The equations of the paper have no clamp; README.md shows what it costs here.
        config.model.update({"width": 64, "depth": 2, "heads": 8, "hidden": 128, "clamp": 0.0})
        config.model.position = "none"
        config.data.update({"task": "recall", "length": 128})
        config.optim.update(learning_rate=5e-3, weight_decay=0.0)
        config.evaluate.batches = 64
    elif preset == "listops":
        config.update({"steps": 1200, "batch_size": 32})
        config.model.update({"width": 64, "depth": 2, "heads": 4, "hidden": 128})
        config.data.update({"task": "listops", "length": 128})
    elif preset == "digits":
        config.update({"steps": 300, "batch_size": 64})
        config.model.update({"width": 64, "depth": 2, "heads": 4, "hidden": 128})
        config.data.task = "digits"
    return config
