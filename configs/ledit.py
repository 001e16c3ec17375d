"""LEDiT and the DiT it is made of, on procedural scenes (16 x 16) or latents of ImageNet."""

from ml_collections import ConfigDict

from jaxformer.config import base

PRESETS = ("tiny", "small", "paper", "scratch")


def get_config(preset: str) -> ConfigDict:
    """A DiT without positions; `--config.model.position=sincos --config.model.pattern=f` is DiT."""
    config = base("ledit")
    config.model = {
        "position": "conv",  # conv | none | sincos | learned | rope
        "stretch": "none",  # beyond the size trained on: none | interpolate | ntk | yarn | riflex
        "pattern": "fc",  # full and causal blocks, repeated: fc | f | c | fcffff | ...
        "scan_order": "mask_corner",  # raster | mask_lower_right | unmask_neighborhood
        "attn_scale": "sqrt_log",  # none | sqrt_log: 1 at the size trained on
        "p_dilate": 0.0,  # how often a call trains the kernel dilated
        "dilation": 2,
        "conv_init": "fan_in",  # fan_in | dirac, to start from a trained DiT
        "conv_norm": False,  # a LayerNorm after the convolution
        "patch": 2,
        "width": 64,
        "depth": 4,
        "heads": 2,
        "scan": False,
        "remat": "none",
        "dtype": "float32",
    }
    config.data = {
        "source": "scenes",  # scenes | images (folder/split/class/*) | latents (folder)
        "folder": "",
        "height": 16,
        "width": 16,
        "trained_height": 16,  # what positions and scales are stretched from
        "trained_width": 16,
        "channels": 3,
        "classes": 4,
        "checker": 2,  # pixels of a field on the discs of scenes
    }
    config.diffusion = {
        "process": "ddpm",  # ddpm | flow
        "steps": 1000,
        "schedule": "linear",  # linear | cosine
        "learned_variance": True,
        "drop": 0.1,  # of the label, for guidance
    }
    config.sample = {
        "sampler": "ddim",  # ddpm | ddim | euler | heun
        "steps": 50,
        "guidance": 1.5,
        "guided_channels": 0,  # the first so many; 0: all
        "rows": 4,  # of the grid of pictures
        "columns": 8,
    }
    config.evaluate.frechet = 0  # examples to draw for the Fréchet distance; 0: none
    config.optim.update(learning_rate=1e-3, warmup_steps=50, schedule="cosine", clip=1.0)
    config.gradient.ema = 0.99
    config.update({"steps": 500, "batch_size": 32})
    if preset == "tiny":
        config.update({"steps": 60, "batch_size": 8})
        config.model.update({"width": 32, "depth": 2, "heads": 2})
        config.gradient.ema = 0.9
        config.optim.warmup_steps = 5
        config.sample.update({"steps": 10, "rows": 2, "columns": 4})
        config.evaluate.update({"batches": 2, "frechet": 16})
    elif preset in ("paper", "scratch"):
        # XL/2 on latents of 256 x 256 pixels. `paper` goes on from the released DiT-XL/2.
        config.update({"steps": 100_000, "batch_size": 256})
        config.model.update({"width": 1152, "depth": 28, "heads": 16, "dtype": "bfloat16"})
        config.model.update({"p_dilate": 0.1, "conv_init": "dirac"})
        config.data.update({"source": "latents", "folder": "imagenet", "channels": 4})
        config.data.update({"height": 32, "width": 32, "trained_height": 32, "trained_width": 32})
        config.data.classes = 1000
        config.optim.update(learning_rate=1e-4, schedule="constant", warmup_steps=0, clip=0.0)
        config.gradient.ema = 0.9999
        config.sample.update({"sampler": "ddpm", "steps": 250, "guided_channels": 3})
        config.evaluate.update({"every": 10_000, "batches": 40})
        config.fit.update(log_every=100, checkpoint_every=5000)
        if preset == "scratch":
            config.steps = 400_000
            config.model.update({"p_dilate": 0.0, "conv_init": "fan_in", "conv_norm": True})
            config.model.pattern = "fc" + 26 * "f"
    return config
