"""SeqPE in a decoder that looks back, in a language model and in a ViT."""

from ml_collections import ConfigDict

from jaxformer.config import base

PRESETS = ("tiny", "small", "text", "digits", "paper")


def get_config(preset: str) -> ConfigDict:
    """Looking back from 64 tokens on; `--config.model.position=learned` is the plain table."""
    config = base("seqpe")
    config.model = {
        "position": "seqpe",  # seqpe | learned | sinusoidal | rope | alibi | none
        "join": "attn_scalar",  # attn_scalar | attn_mul | attn_add | input_add
        "pair": "single",  # pe_qk: single (all layers) | multi (each its own) | none
        "one_vector": False,  # for all heads
        "width": 64,
        "depth": 2,
        "heads": 2,
        "hidden": 128,
        "mlp": "gelu_tanh",
        "dropout": 0.0,
        "scan": False,
        "remat": "none",
        "dtype": "float32",
    }
    config.positions = {
        "limit": 1000,  # P: positions there are; for images all of a square grid
        "width": 64,  # p of the encoder g
        "heads": 4,
        "depth": 2,
        "dropout": 0.0,
        "starts": 8,  # b: shifted blocks, pivots and compared blocks of a step
        "shift_rate": 0.1,  # r: how often the main task is shifted
        "pool": 320,  # random starts of a run
        "candidates": 16,  # c, of a pivot
        "near": 256,  # the window that near candidates come from
        "compared": 16,  # t positions of a block
        "contrast": 0.1,  # weights of the two losses
        "transfer": 0.1,
        "beta": 1.0,  # of the transfer, the share that goes to the student
    }
    config.data = {
        "task": "look_back",  # look_back | text | digits | encoder
        "length": 64,
        "lengths": (64, 128, 256, 512),  # to evaluate at; of digits the sides of canvases
        "vocabulary": 32,
        "text": "python-stdlib",  # or a glob of text files
        "tokenizer": "bytes",
        "validation": 0.05,
    }
    config.optim.update(learning_rate=3e-3, warmup_steps=100, schedule="linear", clip=5.0)
    config.update({"steps": 1200, "batch_size": 32})
    if preset == "tiny":
        tiny(config)
    elif preset == "text":
        config.data.update({"task": "text", "vocabulary": 264})
    elif preset == "digits":
        config.data.update({"task": "digits", "lengths": (8, 12, 16)})
        config.model.update({"join": "attn_mul", "pair": "multi"})
        config.positions.update({"limit": 2500, "near": 64})
    elif preset == "paper":
        paper(config)
    return config


def tiny(config: ConfigDict) -> None:
    config.update({"steps": 60, "batch_size": 8})
    config.model.update({"width": 32, "heads": 2, "hidden": 64})
    config.positions.update({"limit": 100, "width": 16, "heads": 2, "starts": 4, "near": 20})
    config.positions.update({"candidates": 8, "compared": 8})
    config.data.update({"length": 16, "lengths": (16, 32), "vocabulary": 8})
    config.optim.update(learning_rate=3e-3, warmup_steps=5)
    config.evaluate.batches = 2


def paper(config: ConfigDict) -> None:
    """GPT-2 small on windows of 512 tokens (section 4.1)."""
    config.model.update({"width": 768, "depth": 12, "heads": 12, "hidden": 3072, "dropout": 0.1})
    config.model.update({"dtype": "bfloat16"})
    config.positions.update({"limit": 20_000, "width": 768, "heads": 12, "dropout": 0.1})
    config.positions.update({"starts": 16, "candidates": 32, "compared": 32})
    config.data.update({"task": "text", "vocabulary": 50_304, "length": 512})
    config.data.lengths = (512, 1024, 2048, 4096, 8192, 16_384)
    config.optim.update(learning_rate=5e-5, warmup_steps=4000)
    config.update({"steps": 100_000, "batch_size": 128})
