"""Grokked Transformers: facts, what follows from them, and a decoder that finds out."""

from ml_collections import ConfigDict

from jaxformer.config import base

PRESETS = ("tiny", "small", "grok", "paper")


def get_config(preset: str) -> ConfigDict:
    """Composition; `--config.data.task=comparison` or `complex` are the other tasks.

    "grok" has a larger knowledge base and goes on long after the training questions are known: for
    a GPU.
    """
    config = base("grokked_reasoning")
    config.model = {
        "width": 64,
        "depth": 2,
        "heads": 4,
        "hidden": 256,
        "repeat": 1,  # how often the layers run, with the same weights
        "dropout": 0.0,
        "scan": False,
        "remat": "none",
        "dtype": "float32",
    }
    config.data = {
        "task": "composition",  # composition | comparison | complex
        "folder": "",  # of the authors' train.json, test.json and vocab.json
        "entities": 50,
        "relations": 20,
        "out_degree": 10,
        "attributes": 4,
        "levels": 8,
        "ood": 0.1,  # of the facts, or of the entities
        "iid": 0.05,  # of what follows from ID facts, for the test
        "phi": 7.2,  # inferred facts for each ID fact
        "share": 0.03,  # of the comparisons that are given, in the complex task
        "probes": 256,  # rows of each kind
        "context": 6,
        "pad_vocab_to": 1,
    }
    # The rate does not fall: with one that does, fewer ID questions were right in the end.
    config.optim.update(learning_rate=3e-3, warmup_steps=50, schedule="constant", final=0.1)
    config.optim.weight_decay = 0.3
    config.update({"steps": 2400, "batch_size": 128})
    if preset == "tiny":
        config.update({"steps": 60, "batch_size": 16})
        config.model.update({"width": 32, "heads": 2, "hidden": 64})
        config.data.update({"entities": 12, "relations": 6, "out_degree": 4, "probes": 64})
        config.data.update({"attributes": 2, "levels": 4, "phi": 2.0, "ood": 0.2})
        config.optim.warmup_steps = 5
    elif preset == "grok":
        config.update({"steps": 60_000, "batch_size": 512})
        config.data.update({"entities": 200, "relations": 50, "out_degree": 20, "ood": 0.05})
        config.model.update({"depth": 4, "width": 256, "hidden": 1024})
        config.optim.update(learning_rate=3e-4, warmup_steps=500, schedule="constant")
        config.optim.weight_decay = 0.1
    elif preset == "paper":
        config.update({"steps": 1_500_000, "batch_size": 512})
        config.model.update({"width": 768, "depth": 8, "heads": 12, "hidden": 3072})
        config.model.dropout = 0.1
        config.data.update({"entities": 2000, "relations": 200, "out_degree": 20})
        config.data.update({"attributes": 20, "levels": 20, "ood": 0.05, "iid": 0.005})
        config.data.update({"probes": 3000, "context": 10, "pad_vocab_to": 8})
        config.optim.update(learning_rate=1e-4, warmup_steps=2000, schedule="constant")
        config.optim.weight_decay = 0.1
    return config
