"""PFN. `tiny`, `small` and `paper` regress on Gaussian processes, the others as they are named."""

from ml_collections import ConfigDict

from jaxformer.config import base

PRESETS = (
    "tiny",
    "small",
    "tabular",
    "paper",
    "paper_cli",
    "paper_hyper_gp",
    "paper_bnn",
    "paper_tabular",
    "paper_tabular_gp",
    "paper_strokes",
)


def get_config(preset: str) -> ConfigDict:
    """One-dimensional regression, and what each preset changes of it."""
    config = base("pfn")
    config.model = {
        "width": 64,
        "depth": 4,
        "heads": 4,
        "hidden": 128,
        "dropout": 0.0,
        "query_attends_self": True,  # False: as in the authors' later library
        "unit_inputs": False,  # standardise features that come from [0, 1]
        "scan": False,
        "remat": "none",
        "dtype": "float32",
    }
    config.data = {
        "prior": "gp",  # ridge | gp | hyper_gp | bnn | tabular_bnn | tabular_gp | strokes
        "arguments": {
            "features": 1,
            "shape": "rbf",  # rbf | matern52
            "outputscale": 1.0,
            "lengthscale": 0.3,
            "noise": 0.01,  # a variance
            "equidistant": False,
        },
        "T": 20,  # rows of a data set
        "context": "weighted",  # weighted | uniform | fixed
        "limit": 17,  # the context has 0 .. limit - 1 rows, or limit if fixed
    }
    config.criterion = {
        "name": "bars",  # bars | bounded_bars | gaussian | binary | categorical
        "bars": 64,
        "samples": 50_000,  # targets that the borders are drawn from
        "classes": 2,  # of categorical
    }
    # learning_rate 0: the authors' rule by the number of parameters
    config.optim.update(learning_rate=1e-3, warmup_steps=100)
    if preset == "tiny":
        config.update({"steps": 200, "batch_size": 32})
        config.model.update({"width": 32, "depth": 2, "hidden": 64})
        config.data.update({"T": 12, "limit": 11})
        config.criterion.update({"bars": 16, "samples": 2000})
        config.optim.update(learning_rate=3e-3, warmup_steps=5)
        config.evaluate.update({"every": 100, "batches": 8})
    elif preset == "small":
        config.update({"steps": 3000, "batch_size": 128})
        config.evaluate.update({"every": 1000, "batches": 16})
    elif preset == "tabular":
        # At 1e-3 and 3000 steps the classifier only ties with k-nearest neighbours.
        config.update({"steps": 4000, "batch_size": 32})
        config.optim.learning_rate = 2e-3
        config.data.update({"prior": "tabular_bnn", "T": 60, "context": "uniform", "limit": 41})
        config.data.arguments = {"features": 30, "widest": 64}
        config.criterion.name = "binary"
        config.evaluate.update({"every": 1000, "batches": 16})
    elif preset in PRESETS:
        paper(config, preset)
    return config


def paper(config: ConfigDict, preset: str) -> None:
    """The settings of the paper; the warm-up takes a quarter of the steps unless said otherwise."""
    config.model.update({"width": 512, "depth": 6, "hidden": 1024, "dtype": "bfloat16"})
    config.evaluate.update({"every": 1000, "batches": 16})
    config.fit.update(log_every=100, checkpoint_every=2000)
    if preset == "paper":
        # 10,000 epochs of 100 batches of 4, of which 25 make a step. On one device set
        # gradient.accumulate=25 as well.
        config.update({"steps": 40_000, "batch_size": 100})
        config.data.update({"T": 2010, "limit": 2000})
        config.data.arguments.update({"features": 5, "lengthscale": 0.6, "noise": 1e-4})
        config.criterion.update({"bars": 1000, "samples": 1_000_000})
        config.optim.update(learning_rate=3e-4)
    elif preset == "paper_cli":
        config.update({"steps": 2000, "batch_size": 1000})
        config.data.update({"T": 10, "limit": 10})
        config.data.arguments.update({"outputscale": 0.1, "lengthscale": 0.1, "noise": 0.1})
        config.criterion.update({"bars": 100, "samples": 100_000})
    elif preset == "paper_hyper_gp":
        config.update({"steps": 40_000, "batch_size": 100})
        config.data.update({"prior": "hyper_gp", "T": 110, "limit": 100})
        config.data.arguments = {"features": 5, "shape": "matern52"}
        config.criterion.update({"bars": 1000, "samples": 1_000_000})
        config.optim.update(learning_rate=3e-4)
    elif preset == "paper_bnn":
        config.update({"steps": 40_000, "batch_size": 256})
        config.model.update({"width": 256, "depth": 5, "hidden": 512})
        config.data.update({"prior": "bnn", "T": 300, "limit": 100})
        config.data.arguments = {"features": 3, "hidden": 5}
        config.criterion.name = "binary"
        config.optim.update(learning_rate=2.006e-5)
    elif preset in ("paper_tabular", "paper_tabular_gp"):
        config.update({"steps": 10_000, "batch_size": 512})
        config.model.update({"depth": 5, "dropout": 0.5})
        config.data.update({"context": "uniform", "limit": 41})
        config.data.arguments = {"features": 60}
        config.criterion.name = "binary"
        if preset == "paper_tabular":
            config.data.update({"prior": "tabular_bnn", "T": 50})
            config.optim.update(learning_rate=1.642e-5)
        else:
            config.data.update({"prior": "tabular_gp", "T": 100})
            config.optim.update(learning_rate=6.272e-5)
    elif preset == "paper_strokes":
        config.update({"steps": 25_600, "batch_size": 1000})
        config.model.update({"width": 1024, "hidden": 2048})
        config.data.update({"prior": "strokes", "T": 26, "context": "fixed", "limit": 25})
        config.data.arguments = {"classes": 5, "shots": 5}
        config.criterion.update({"name": "categorical", "classes": 5})
        config.optim.update(learning_rate=1e-4)
    config.optim.warmup_steps = 500 if preset == "paper_strokes" else config.steps // 4
