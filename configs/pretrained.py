"""A model from a Hugging Face folder: `jaxformer import FOLDER --workdir RUN` fills this in.

`huggingface` is the folder's `config.json`, word for word; here that of a very small GPT-2.
"""

from ml_collections import ConfigDict

from jaxformer.config import base

PRESETS = ("tiny",)


def get_config(preset: str) -> ConfigDict:
    """The smallest GPT-2, on bytes."""
    config = base("pretrained")
    config.huggingface = {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": 257,
        "n_positions": 128,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 2,
    }
    config.dtype = "float32"  # of the residual stream
    config.data = {
        "train": "",  # a glob of text files, a folder of images, a file of JSON lines
        "test": "",
        "tokenizer": "bytes",
        "validation": 0.05,  # the tail of the text that is held out, without a test
        "length": 64,
        "mean": (0.5, 0.5, 0.5),  # of the pixels, in [0, 1]
        "std": (0.5, 0.5, 0.5),
    }
    config.optim.update(learning_rate=5e-5, schedule="linear", warmup_steps=10)
    config.evaluate.batches = 4
    return config
