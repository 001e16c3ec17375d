"""Linear attention that learns regression in context, by Adam or by gradient flow; and GPT-2's."""

from ml_collections import ConfigDict

from jaxformer.config import base

PRESETS = ("tiny", "small", "flow", "nonlinear", "paper")
DIAGONAL = (1.0, 0.8, 0.6, 0.4, 0.2)


def get_config(preset: str) -> ConfigDict:
    """One linear layer on drawn prompts (tiny, small) or by gradient flow; else a decoder."""
    config = base("linear_icl")
    config.data = {
        "covariance": "fixed",  # fixed | exponential: its diagonal times Exp(1), new in each prompt
        "diagonal": DIAGONAL,  # of the covariance of x, or of its mean
        "N": 20,  # examples before the query
    }
    if preset in ("tiny", "small", "flow"):
        config.experiment = "flow" if preset == "flow" else "prompts"
        config.model = {"sigma": 0.1}  # of Assumption 3.3
        config.data.covariances = 1000  # how many stand for the law, where it varies
    else:
        config.experiment = "transformer"
        config.model = {
            "width": 32,
            "depth": 3,
            "heads": 2,
            "positions": 41,  # points, query included, that the position table has room for
            "dropout": 0.0,
            "scan": False,
            "remat": "none",
            "dtype": "float32",
        }
    if preset == "tiny":
        config.update({"steps": 100, "batch_size": 256})
        config.optim.learning_rate = 0.05
        config.evaluate.batches = 4
    elif preset == "small":
        config.update({"steps": 3000, "batch_size": 4096})
        config.optim.learning_rate = 0.01
        config.evaluate.update({"every": 500, "batches": 4})
    elif preset == "flow":
        config.steps = 40
        config.flow = {"time": 400.0, "rtol": 1e-6, "atol": 1e-8}  # of the whole flow, its steps
        config.evaluate.every = 4
        config.fit.log_every = 1
    elif preset == "nonlinear":
        config.update({"steps": 2000, "batch_size": 64})
        config.data.update({"diagonal": (1.0, 1.0), "N": 8})
        # Muon: 500 of its steps reach the error of 1000 of Adam's.
        config.optim.update(name="muon", learning_rate=5e-3, warmup_steps=100)
        config.evaluate.batches = 16
    elif preset == "paper":
        # The paper names the decoder; steps and batch are those of the code it builds on.
        config.update({"steps": 500_000, "batch_size": 64})
        config.model.update({"width": 256, "depth": 12, "heads": 8, "positions": 101})
        config.data.update({"diagonal": (1.0,) * 20, "N": 40})
        config.optim.update(learning_rate=1e-4, schedule="constant", clip=0.0)
        config.evaluate.update({"every": 10_000, "batches": 50})
        config.fit.update(log_every=100, checkpoint_every=10_000)
    return config
