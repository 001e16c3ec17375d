"""DSFormer: an encoder of text pairs whose weights become sparse times small dense matrices."""

from ml_collections import ConfigDict

from jaxformer.config import base
from jaxformer.setups.fields import text_pairs

PRESETS = ("tiny", "small", "paper")


def get_config(preset: str) -> ConfigDict:
    """Procedural entailment at 3.8 times; `paper` is BERT-base on a task of GLUE."""
    config = base("dsformer")
    text_pairs(config)
    config.factor = {
        "method": "weight",  # weight | coef (straight through) | frozen | svd
        "ratio": 3.8,  # of svd; of the others it follows from these:
        # With q = 32 and as many bits (12, 2, 24, 4) it is the bases that take most of them.
        "columns": 16,  # q
        "atoms": 8,  # r
        "nonzeros": 2,  # s
        "up_atoms": 12,  # r and s of the wide layer of MLPs
        "up_nonzeros": 3,
        "group": 0,  # m of n:m sparsity; 0: anywhere in a row
        "every": 1,  # steps between new supports, of method weight
        "rounds": 10,  # of alternation before training
        "weighting": "none",  # none | fisher: how much rows matter at the start
        "score_steps": 20,
        "distill": 0.0,  # the share of the dense model's answers in what is learned, such as .5
        "temperature": 2.0,  # of both distributions
    }
    config.huggingface = ConfigDict()  # of an imported BERT its config.json
    config.init_from = ""  # the run of a trained encoder, such as `jaxformer import` makes
    config.fresh = r"(?!)"  # its parameters that begin anew
    config.dense_steps = 1200
    config.rate_scale = 0.3  # the learning rate of factors, of that of the dense model
    config.optim.update(name="muon", learning_rate=5e-3, warmup_steps=100, clip=1.0)
    config.optim.weight_decay = 0.01
    config.update({"steps": 600, "batch_size": 64})
    if preset == "tiny":
        config.update({"steps": 30, "dense_steps": 60, "batch_size": 16})
        config.model.update({"width": 32, "depth": 1, "heads": 2, "hidden": 64})
        config.data.update({"train": 512, "test": 128, "test_rows": 64})
        config.factor.rounds = 3
        config.optim.warmup_steps = 5
    elif preset == "paper":
        # BERT-base at 2.8 times, fine-tuned; with init_from and dense_steps=0 of an imported one.
        config.model.update({"width": 768, "depth": 12, "heads": 12, "hidden": 3072})
        config.model.update({"order": "post", "dropout": 0.1, "dtype": "bfloat16"})
        config.data.update({"task": "mnli", "folder": "glue/MNLI", "length": 128})
        config.data.tokenizer = "bert-base-uncased/vocab.txt"
        config.factor.update({"columns": 64, "atoms": 96, "nonzeros": 12})
        config.factor.update({"up_atoms": 128, "up_nonzeros": 16})
        config.factor.update({"every": 100, "ratio": 2.8})
        config.optim.update(name="adamw", learning_rate=2e-5, warmup_steps=3700, schedule="linear")
        config.rate_scale = 1.0
        config.update({"steps": 36_800, "dense_steps": 36_800, "batch_size": 32})
    return config
