"""A small language model that learns in context, to be compared with descent."""

from ml_collections import ConfigDict

from jaxformer.config import base

PRESETS = ("tiny", "small", "paper")


def get_config(preset: str) -> ConfigDict:
    """The model of the claims; "paper" is of the size that the paper loads from a checkpoint."""
    config = base("icl_vs_gd")
    config.model = {
        "position": "alibi",  # learned | rope | none | sinusoidal | alibi
        "width": 64,
        "depth": 2,
        "heads": 4,
        "hidden": 128,
        "mlp": "gelu_tanh",
        "norm": "layernorm",
        "use_bias": True,
        "dropout": 0.0,
        "scan": False,
        "remat": "none",
        "dtype": "float32",
    }
    config.data = {
        "length": 64,
        "topics": 20,
        "words": 60,
        "symbols": 8,  # x of a document's runs
        "answers": 4,  # and its y
        "runs": 0.5,  # of the documents have runs
        "enter": 0.1,  # of the words are followed by one
        "leave": 0.05,  # of the pairs end one
        "drift": 0.5,  # of the pairs are followed by another y for one of the x
        "grammar": 0.9,  # of the words follow from one of the last `order`
        "order": 3,
    }
    config.optim.update(learning_rate=1e-2, warmup_steps=50, name="muon", final=0.1)
    config.update({"steps": 2000, "batch_size": 32})
    config.drifting = {"steps": 300, "learning_rate": 3e-3}  # `steps` are those before it
    if preset == "tiny":
        config.update({"steps": 60, "batch_size": 8})
        config.model.update({"width": 32, "heads": 2, "hidden": 64})
        config.data.update({"length": 24, "topics": 4, "words": 20, "symbols": 4, "answers": 2})
        config.optim.warmup_steps = 5
        config.drifting.steps = 20
        config.evaluate.batches = 2
    elif preset == "paper":
        paper(config)
    return config


def paper(config: ConfigDict) -> None:
    """LLaMA-7B, which the paper takes as it is; here with a stream of documents of its length."""
    config.model.update({"width": 4096, "depth": 32, "heads": 32, "hidden": 11_008})
    config.model.update({"mlp": "swiglu", "norm": "rmsnorm", "use_bias": False})
    config.model.position = "rope"
    config.model.update({"dtype": "bfloat16", "scan": True, "remat": "full"})
    config.data.update({"length": 2048, "words": 31_998})
    config.optim.update(name="adamw", learning_rate=3e-4, warmup_steps=2000, final=0.1)
    config.optim.weight_decay = 0.1
    config.update({"steps": 100_000, "batch_size": 1024})
    config.drifting.update({"steps": 20_000, "learning_rate": 1e-4})
    config.fit.update(log_every=50, checkpoint_every=1000)
