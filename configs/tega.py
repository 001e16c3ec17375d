"""TEGA: logical queries over knowledge graphs, answered by a Transformer."""

from ml_collections import ConfigDict

from jaxformer.config import base

PRESETS = ("tiny", "small", "paper")


def get_config(preset: str) -> ConfigDict:
    """A graph made of rules; "paper" reads FB15k and its queries from `data.folder`."""
    config = base("tega")
    config.model = {
        "position": "rpe",  # ape | rpe | dpe | rope | none
        "longest": 16,  # offset of relative keys; 0: as long as the sequence
        "typed": True,  # relative keys by pairs of kinds of tokens
        "guide": "soft",  # none | soft | hard | half | distance
        "split_terms": False,  # existential and free variables are kinds of their own
        "smoothing": 0.0,
        "width": 64,
        "depth": 2,
        "heads": 4,
        "hidden": 128,
        "order": "post",
        "dropout": 0.0,
        "scan": False,
        "remat": "none",
        "dtype": "float32",
    }
    config.data = {
        "folder": "",  # of stats.txt, train_queries.json and test_queries.json
        "syntax": "efo",  # efo | lisp
        "entities": 40,  # with 60 too few of 2p and ip were learned in the time there is
        "relations": 8,
        "out_degree": 2,
        "observed": 0.8,  # of the triples
        "train_types": ("1p", "2p", "2i", "2u", "2in", "ip"),
        "test_types": ("3p", "3i", "pi", "inp", "up"),
        "train_queries": 2000,  # of each type, or as many as there are
        "test_queries": 400,
        "length": 22,  # tokens of the longest query
    }
    # Of the rate, what the guide's gamma learns at: at the whole of it a guide costs 0.02 MRR.
    config.guide_rate = 0.05
    # Adam at 2e-3 knew 0.25 of the facts (1p) after 800 steps, Muon at 1e-2 0.69 after 600.
    config.optim.update(name="muon", learning_rate=1e-2, warmup_steps=50)
    config.optim.update(schedule="linear", final=0.1, weight_decay=0.01)
    config.update({"steps": 1000, "batch_size": 64})
    if preset == "tiny":
        config.update({"steps": 60, "batch_size": 16})
        config.model.update({"width": 32, "heads": 2, "hidden": 64})
        config.data.update({"entities": 20, "train_queries": 60, "test_queries": 10})
        config.data.update({"train_types": ("1p", "2i", "2p"), "test_types": ("ip",)})
        config.optim.warmup_steps = 5
    elif preset == "paper":
        from jaxformer.papers.tega.types import SEEN, UNSEEN

        config.update({"steps": 500_000, "batch_size": 1024})
        config.model.update({"width": 400, "depth": 3, "heads": 16, "hidden": 3072})
        config.model.update({"dropout": 0.1, "smoothing": 0.1})
        config.data.update({"entities": 14_951, "relations": 2690, "length": 48})
        config.data.update({"train_types": tuple(SEEN), "test_types": tuple(UNSEEN)})
        config.optim.update(name="adamw", learning_rate=1e-4, warmup_steps=1000)
        config.optim.schedule = "constant"
        config.guide_rate = 1.0
        config.evaluate.every = 20_000
    return config
