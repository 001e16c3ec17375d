"""A transformer that acts on bandits as LinUCB or as Thompson sampling does."""

from ml_collections import ConfigDict

from jaxformer.config import base

PRESETS = ("tiny", "small", "bernoulli", "paper")


def get_config(preset: str) -> ConfigDict:
    """Algorithm distillation of LinUCB on linear bandits; `bernoulli` is DPT."""
    config = base("icrl")
    config.environment = {
        "kind": "linear",  # linear | bernoulli
        "actions": 5,
        "dimension": 3,  # of the features of arms
        "std": 0.5,  # deviation of the rewards of a linear bandit
        "prior": "uniform",  # of its w: uniform | gaussian
    }
    config.model = {
        "backbone": "relu",  # relu | softmax
        "width": 32,
        "depth": 3,
        "heads": 4,  # of the softmax backbone; the other has one
        "positions": 204,
        "scan": False,
        "remat": "none",
        "dtype": "float32",
    }
    config.data = {
        "controllers": ("linucb",),  # linucb | thompson | empirical_mean | uniform
        "shares": (1.0,),  # of rows that each of them makes
        "labels": "ad",  # ad | dpt | approximate
        "steps": 50,  # T
        "problems": 200,  # to measure regret on
    }
    # Muon: its loss after 100 steps, 0.75, is below that of 300 steps of Adam at 1e-3, 0.99.
    config.optim.update(name="muon", learning_rate=1e-2, weight_decay=1e-4, warmup_steps=20)
    config.update({"steps": 400, "batch_size": 64})
    if preset == "tiny":
        config.update({"steps": 60, "batch_size": 16})
        config.model.update({"width": 16, "depth": 2, "positions": 24})
        config.data.update({"steps": 10, "problems": 16})
        config.optim.update(learning_rate=3e-3, warmup_steps=5)
        config.evaluate.batches = 2
    elif preset == "bernoulli":
        config.environment.update({"kind": "bernoulli", "dimension": 5})
        config.data.update({"controllers": ("uniform", "thompson"), "shares": (0.5, 0.5)})
        config.data.labels = "dpt"
        # After 800 its regret is 1.03, 1.41 and .97 of Thompson sampling's (seeds 0 to 2).
        config.steps = 1600
    elif preset == "paper":
        config.environment.update({"actions": 10, "dimension": 5, "std": 1.5})
        config.model.update({"depth": 8, "positions": 804})
        config.data.steps = 200
        config.update({"steps": 1_250_000, "batch_size": 128})
        config.optim.update(name="adamw", learning_rate=1e-3)
        config.optim.update(schedule="constant", warmup_steps=0)
        config.evaluate.update({"every": 31_250, "batches": 50})
        config.fit.update(log_every=100, checkpoint_every=31_250)
    return config
