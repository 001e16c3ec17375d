"""Combiner: causal language models of pixels, of text, and of sequences that repeat themselves."""

from ml_collections import ConfigDict

from jaxformer.config import base

PRESETS = ("tiny", "small", "paper", "repeat", "text")


def get_config(preset: str) -> ConfigDict:
    """Digits as sequences of pixels; `repeat`, a lookup far back; `text`; Wiki-40B for `paper`."""
    config = base("combiner")
    config.model = {
        "pattern": "fixed",  # fixed | logsparse | axial | mixture; local | softmax | window
        "segment": 8,  # columns of the grid; what `window` sees
        "vocabulary": 18,
        "width": 64,
        "depth": 2,
        "heads": 4,
        "hidden": 256,
        "mlp": "relu",
        "position": "learned",
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "tied": True,
        "scan": False,
        "remat": "none",
        "dtype": "float32",
    }
    config.data = {
        "task": "digits",  # digits | repeat | text
        "length": 64,
        "period": 0,  # of repeat; 0: half of the length
        "symbols": 8,  # of repeat
        "text": "python-stdlib",  # or a glob of text files
        "tokenizer": "bytes",  # or a tokenizer.json, or a SentencePiece .model
        "validation": 0.05,  # the tail of the text that is held out
    }
    config.sample = {"prompt": "def ", "length": 200, "temperature": 0.7}
    config.optim.update(learning_rate=3e-3, warmup_steps=50)
    config.update({"steps": 600, "batch_size": 32})
    if preset == "tiny":
        config.update({"steps": 60, "batch_size": 8})
        config.model.update({"width": 32, "heads": 2, "hidden": 64})
        config.optim.warmup_steps = 5
        config.evaluate.batches = 4
    elif preset == "repeat":
        # A window of 8 in two layers sees 14 positions back; what is asked for is 31 back at least.
        config.update({"steps": 600, "batch_size": 8})
        config.model.update({"vocabulary": 8, "heads": 8})
        config.data.update({"task": "repeat", "length": 512, "period": 32})
    elif preset == "text":
        config.update({"steps": 400, "batch_size": 16})
        config.model.update({"vocabulary": 257, "segment": 16, "width": 128, "hidden": 512})
        config.data.update({"task": "text", "length": 256})
    elif preset == "paper":
        # The language model of the authors' code; Wiki-40B (English) as text files.
        config.update({"steps": 125_000, "batch_size": 128})
        config.model.update({"vocabulary": 32_000, "width": 768, "depth": 12, "heads": 12})
        config.model.update({"segment": 128, "hidden": 3072, "dtype": "bfloat16"})
        config.data.update({"task": "text", "length": 2048, "text": "wiki40b/en/*.txt"})
        config.data.tokenizer = "wiki40b.model"
        config.optim.update(learning_rate=3e-4, warmup_steps=10_000)
        config.evaluate.every = 5000
        config.fit.update(log_every=100, checkpoint_every=2000)
    return config
