"""Searching graphs, by transformers with one-hot embeddings."""

from ml_collections import ConfigDict

from jaxformer.config import base

PRESETS = ("tiny", "small", "paper")


def get_config(preset: str) -> ConfigDict:
    """Balanced graphs; `--config.data.graphs=naive --config.data.lookahead=-1` are naive ones."""
    config = base("graph_search")
    config.model = {
        "hidden": 16,  # dimensions of the stream beside those of tokens and positions
        "depth": 3,
        "heads": 1,
        "rate": 1,  # width of the MLPs, in widths of the stream
        "ablate": "none",  # none | out | value_out
        "causal": False,
        "repeat": 1,
        "remat": "none",
        "dtype": "float32",
    }
    config.data = {
        "task": "search",  # search | depth_first | selection_inference
        "graphs": "balanced",  # balanced | naive | star
        "length": 23,  # room for (length - 5) // 3 edges, and vertices
        "lookahead": 2,  # the largest; -1 with naive graphs
        "tested": 2,  # the largest look-ahead of the tests
        "max_edges": 0,  # 0: as many as there is room for
        "max_prefix": -1,  # vertices in the chain before the start; -1: any
        "curriculum": False,  # look-ahead 1 first, then 2, ...: as many steps for each
    }
    # For a look-ahead of 2, Adam (2e-3, batches of 64, length 26) was at chance after 1000 steps;
    # Muon with length 23 was right in 91 % after 300, with length 26 at chance after 400.
    config.optim.update(name="muon", learning_rate=1e-2, warmup_steps=20)
    config.optim.update(schedule="linear", final=0.1)
    # After 600 steps naive graphs have taught as much; what balance gives here is to learn sooner.
    config.update({"steps": 300, "batch_size": 128})
    if preset == "tiny":
        config.update({"steps": 60, "batch_size": 16})
        config.model.update({"depth": 2, "hidden": 4})
        config.data.update({"length": 17, "lookahead": 1, "tested": 1})
        config.optim.warmup_steps = 5
        config.evaluate.batches = 1
    elif preset == "paper":
        config.update({"steps": 400_000, "batch_size": 1024})
        config.model.depth = 6
        config.data.update({"length": 128, "lookahead": 20, "tested": 20})
        config.optim.update(name="signum", learning_rate=1e-5, warmup_steps=0, clip=0.0)
        config.optim.update(schedule="constant", weight_decay=0.1)
        config.evaluate.batches = 80
    return config
