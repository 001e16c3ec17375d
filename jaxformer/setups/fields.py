"""Fields that the configs of several papers have."""

from __future__ import annotations

from ml_collections import ConfigDict


def image_classifier(config: ConfigDict) -> None:
    """What `jaxformer.setups.vision` reads: a small ViT on scikit-learn's digits."""
    config.model = {
        "width": 64,
        "depth": 4,
        "heads": 4,
        "hidden": 256,
        "patch": 2,
        "pool": "token",  # token | mean: what the head reads
        "dropout": 0.0,
        "scan": False,
        "remat": "none",
        "dtype": "float32",
    }
    config.data = {
        "train": "",  # a folder of images; none: scikit-learn's digits
        "test": "",
        "size": 8,
        "classes": 10,
        "images": 0,  # of the digits: how many to train on, the others are tested on; 0: 1437
    }
    config.huggingface = ConfigDict()  # of an imported model its config.json, for `model`'s sizes
    config.init_from = ""  # the run of a trained model, such as `jaxformer import` makes
    config.fresh = r"(?!)"  # its parameters that begin anew: r"^head/" for other classes


def deit_s(config: ConfigDict) -> None:
    """The sizes of DeiT-S, on folders of ImageNet."""
    config.model.update({"width": 384, "depth": 12, "heads": 6, "hidden": 1536, "patch": 16})
    config.data.update({"train": "imagenet/train", "test": "imagenet/val"})
    config.data.update({"size": 224, "classes": 1000})
    config.model.dropout = 0.0


def regularised(config: ConfigDict, preset: str) -> None:
    """How a ViT of the digits is trained that others are then made of; less of it at "tiny"."""
    config.model.dropout = 0.1
    config.batch_size = 32
    config.optim.update(learning_rate=2e-3, warmup_steps=50, weight_decay=0.1)
    if preset == "tiny":
        config.model.update({"width": 32, "depth": 2, "hidden": 64, "patch": 4, "dropout": 0.0})
        config.batch_size = 16
        config.optim.warmup_steps = 5
        config.evaluate.batches = 4


def post_training(config: ConfigDict, preset: str) -> None:
    """What `jaxformer.setups.post_training` reads; "paper" is DeiT-S, imported, on ImageNet."""
    image_classifier(config)
    config.bits = {"weights": 4, "activations": 4}
    config.calibration = {"images": 32}  # the first of the training data
    # Small models have none: put in, without changing what the model computes; 0 channels: none.
    config.outliers = {"channels": 3, "factor": 20.0}
    regularised(config, preset)
    if preset == "tiny":
        config.steps = 40
        config.calibration.images = 8
    elif preset == "paper":
        deit_s(config)
        config.outliers.channels = 0
        config.update({"steps": 0, "init_from": "runs/deit_small"})
    else:
        # Trained on 1257 digits it has 96.9 % of the others (seed 0); 2000 steps of Adam had 95.2.
        config.steps = 1200
        config.optim.update(name="muon", learning_rate=5e-3, weight_decay=0.2)


def reconstruction(config: ConfigDict, preset: str, float_share: float) -> None:
    """How blocks are reconstructed after their calibration; not at all but at "paper"."""
    config.reconstruct = {
        # Of each block; 0: calibration alone. Rates follow: the paper's at 20,000.
        "steps": 20_000 if preset == "paper" else 0,
        "images": 1024,  # the first of the training data
        "batch_size": 32,
        "float_share": float_share,  # of a block's inputs; the rest is what quantised blocks give
    }


def text_pairs(config: ConfigDict) -> None:
    """What `jaxformer.setups.texts` reads: a small encoder on procedural entailment."""
    config.model = {
        "width": 64,
        "depth": 2,
        "heads": 4,
        "hidden": 256,
        "order": "pre",  # pre | post
        "dropout": 0.0,
        "scan": False,
        "remat": "none",
        "dtype": "float32",
    }
    config.data = {
        # entailment (by rule); of GLUE cola | sst-2 | mrpc | sts-b | qqp | mnli | mnli-mm | qnli |
        # rte | wnli, each with its own scores; squad (v1.1)
        "task": "entailment",
        "train": 100_000,  # of entailment: how many pairs
        "near": 1 / 16,  # of the neutral ones: how many cannot be told by the attribute alone
        "test": 2000,
        "test_rows": 100,  # of a test batch
        "length": 24,
        "stride": 128,  # of squad: pieces from one window of a text to the next
        "folder": "",  # of the task's TSV files, or of SQuAD's two JSON files
        "tokenizer": "",  # a WordPiece vocab.txt, or a tokenizer.json
        "vocabulary": 30_522,
    }
