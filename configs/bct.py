"""BCT: an encoder of text pairs, compressed in blocks without retraining."""

from ml_collections import ConfigDict

from jaxformer.config import base
from jaxformer.setups.fields import text_pairs

PRESETS = ("tiny", "small", "paper")


def get_config(preset: str) -> ConfigDict:
    """Procedural entailment; `paper` is BERT-base on a task of GLUE."""
    config = base("bct")
    text_pairs(config)
    # BERT's. Four bits erase weights that outliers have made small beside their block's largest;
    # without dropout one may need just these channels: 3.2 points lost at seed 1 (1200 steps, 60
    # times), with it .02 (2000 steps, 80 times).
    config.model.dropout = 0.1
    config.compress = {
        "bits": "int4/8",  # float | int8 | int4/8 (weights/values) | fp8
        "granularity": "block",  # block | row | tensor: what shares a shift
        # The width of 768 has 12 blocks of 64 in the paper; 64 is one block of 64, or 4 of 16.
        "weight_rows": 16,
        "weight_columns": 16,
        "value_columns": 16,
        "shift_bits": 8,
        "probs_unsigned": False,  # one bit more for probabilities
        "integer": False,  # int8 codes and int32 sums, not rounded floats
        "static": False,  # shifts of values found beforehand, not block by block as they come
        "calibration": 8,  # of static: batches of training data that are looked at
    }
    # Put into the trained model without a change of what it computes; at none | norms | values.
    # Which channels is told by the seed and `draw`.
    config.outliers = {"at": "norms", "channels": 2, "factor": 80.0, "draw": 0}
    config.huggingface = ConfigDict()  # of an imported BERT its config.json
    config.init_from = ""  # the run of a trained encoder, such as `jaxformer import` makes
    config.optim.update(name="muon", learning_rate=5e-3, warmup_steps=100, clip=1.0)
    config.optim.weight_decay = 0.01
    # Seed 3 knows two answers of three until step 1250, and with 1200 steps never more.
    config.update({"steps": 2000, "batch_size": 64})
    if preset == "tiny":
        config.update({"steps": 60, "batch_size": 16})
        config.model.update({"width": 32, "depth": 2, "heads": 2, "hidden": 64, "dropout": 0.0})
        config.data.update({"train": 512, "test": 128, "test_rows": 64})
        config.optim.warmup_steps = 5
    elif preset == "paper":
        # Fine-tuned BERT-base; with init_from and steps=0 nothing is trained.
        config.model.update({"width": 768, "depth": 12, "heads": 12, "hidden": 3072})
        config.model.update({"order": "post", "dtype": "bfloat16"})
        config.data.update({"task": "mnli", "folder": "glue/MNLI", "length": 128})
        config.data.tokenizer = "bert-base-uncased/vocab.txt"
        config.compress.update({"weight_rows": 32, "weight_columns": 32, "value_columns": 64})
        config.compress.shift_bits = 6
        config.outliers.at = "none"
        config.optim.update(name="adamw", learning_rate=2e-5, warmup_steps=3700, schedule="linear")
        config.update({"steps": 36_800, "batch_size": 32})
    return config
