"""The plain decoder: GPT-2 (learned positions, LayerNorm, GELU) and Llama (RoPE, RMSNorm, SwiGLU).

The large presets are those that `jaxformer plan` and the benchmarks are run with; their text is
yours to name.
"""

from ml_collections import ConfigDict

from jaxformer.config import base

PRESETS = ("tiny", "small", "gpt2_124m", "gpt_1p3b", "llama_7b", "llama_70b")


def get_config(preset: str) -> ConfigDict:
    """A small Llama on the embedded text, and what each preset changes of it."""
    config = base("decoder")
    config.model = {
        "vocabulary": 264,  # bytes and an end, up to a multiple of 8
        "width": 128,
        "depth": 4,
        "heads": 4,
        "kv_heads": 4,
        "hidden": 352,
        "mlp": "swiglu",
        "norm": "rmsnorm",
        "position": "rope",
        "use_bias": False,
        "dropout": 0.0,
        "tied": True,
        "scan": False,
        "remat": "none",
        "dtype": "float32",
    }
    config.data = {
        "text": "python-stdlib",  # or a glob of text files
        "tokenizer": "bytes",  # or a tokenizer.json, or a SentencePiece .model
        "validation": 0.05,  # the tail of the text that is held out
        "length": 256,
    }
    config.optim.update(learning_rate=3e-3, warmup_steps=50, weight_decay=0.1, final=0.1)
    if preset == "tiny":
        config.update({"steps": 60, "batch_size": 8})
        config.model.update({"width": 32, "depth": 2, "heads": 2, "kv_heads": 1, "hidden": 96})
        config.data.length = 64
        config.optim.warmup_steps = 5
        config.evaluate.update({"every": 30, "batches": 4})
    elif preset == "small":
        config.update({"steps": 360, "batch_size": 16})
        config.evaluate.update({"every": 120, "batches": 16})
        config.fit.checkpoint_every = 120
    elif preset in PRESETS:
        large(config, preset)
    return config


def large(config: ConfigDict, preset: str) -> None:
    """Sizes of Radford et al. 2019, Brown et al. 2020 (table 2.1) and Touvron et al. 2023."""
    config.model.update({"dtype": "bfloat16", "scan": True, "remat": "full"})
    config.optim.update(learning_rate=3e-4, warmup_steps=2000, final=0.1)
    config.evaluate.update({"every": 2000, "batches": 64})
    config.fit.update(log_every=50, checkpoint_every=1000)
    config.steps = 100_000
    if preset.startswith("gpt"):
        config.model.update({"mlp": "gelu_tanh", "norm": "layernorm", "position": "learned"})
        config.model.update({"use_bias": True, "vocabulary": 50_304})
    if preset == "gpt2_124m":
        config.model.update({"width": 768, "depth": 12, "heads": 12, "kv_heads": 12})
        config.model.update({"hidden": 3072, "remat": "none"})
        config.update({"batch_size": 512})
        config.data.length = 1024
        config.optim.learning_rate = 6e-4
    elif preset == "gpt_1p3b":
        config.model.update({"width": 2048, "depth": 24, "heads": 16, "kv_heads": 16})
        config.model.update({"hidden": 8192})
        config.update({"batch_size": 512})
        config.data.length = 2048
    elif preset == "llama_7b":
        config.model.update({"vocabulary": 32_000, "width": 4096, "depth": 32, "heads": 32})
        config.model.update({"kv_heads": 32, "hidden": 11_008, "tied": False})
        config.update({"batch_size": 1024})
        config.data.length = 4096
        config.mesh.update({"data": 1, "fsdp": -1})
    elif preset == "llama_70b":
        config.model.update({"vocabulary": 32_000, "width": 8192, "depth": 80, "heads": 64})
        config.model.update({"kv_heads": 8, "hidden": 28_672, "tied": False})
        config.update({"batch_size": 1024})
        config.data.length = 4096
        config.optim.learning_rate = 1.5e-4
        config.mesh.update({"data": 1, "fsdp": -1})
