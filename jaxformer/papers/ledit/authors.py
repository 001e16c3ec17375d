"""The names of the DiT code that the paper builds on (`facebookresearch/DiT`) as ours.

No forward pass of the paper's own is published; its changes add the convolution alone to these.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from jaxformer.errors import ConfigError
from jaxformer.interop import authors
from jaxformer.interop.authors import Tree, Weights, linear
from jaxformer.nn.conv import dirac


def modulation(weights: Weights, name: str, parts: int) -> Tree:
    """AdaLN's Linear, whose outputs are `parts` vectors one after another."""
    layer = linear(weights, f"{name}adaLN_modulation.1")
    return {"projection": authors.to_heads(layer, parts)}


def block(weights: Weights, name: str, heads: int) -> Tree:
    """`DiTBlock` as an `AdaLNZero`; `name` ends with a dot, or is empty."""
    return {
        "mixer": authors.fused_attention(
            linear(weights, f"{name}attn.qkv"), linear(weights, f"{name}attn.proj"), heads
        ),
        "mlp": {
            "up": linear(weights, f"{name}mlp.fc1"),
            "down": linear(weights, f"{name}mlp.fc2"),
        },
        "modulation": modulation(weights, name, 6),
    }


def head(weights: Weights, patch: int) -> Tree:
    """`FinalLayer` as a `ModulatedHead`: its outputs are (P, P, channels), channels fastest."""
    layer = linear(weights, "final_layer.linear")
    split = {x: y.reshape(*y.shape[:-1], patch, patch, -1) for x, y in layer.items()}
    return {"projection": split, "modulation": modulation(weights, "final_layer.", 2)}


def dit(weights: Weights, *, heads: int, depth: int, patch: int) -> Tree:
    """`DiT` as a `jaxformer.models.dit.DiT`, without a position."""
    projection = weights["x_embedder.proj.weight"]
    return {
        "embed": {
            "projection": {
                "kernel": projection.transpose(2, 3, 1, 0),
                "bias": weights["x_embedder.proj.bias"],
            }
        },
        "time": {
            "up": linear(weights, "t_embedder.mlp.0"),
            "down": linear(weights, "t_embedder.mlp.2"),
        },
        "label_embed": {"table": weights["y_embedder.embedding_table.weight"]},
        "stack": {f"block_{i}": block(weights, f"blocks.{i}.", heads) for i in range(depth)},
        "head": head(weights, patch),
    }


def read(config: ConfigDict, weights: Weights) -> Tree:
    """Released DiT weights as what fine-tuning starts from.

    The convolution is the identity at first; the table of positions is left out, unless the config
    has a learned one.

    Raises:
        ConfigError: the config normalises after the convolution, which no DiT did.
    """
    model, data = config.model, config.data
    if model.position == "conv" and model.conv_norm:
        raise ConfigError("model.conv_norm=True: is of training from scratch; set it to False")
    sizes = {name: model[name] for name in ("heads", "depth", "patch")}
    found = dit(weights, **sizes)
    table = weights.get("pos_embed")
    if model.position == "conv":
        kernel = dirac(jax.random.key(0), (9, model.width, model.width))
        bias = jnp.zeros(model.width)
        found["position"] = {"conv": {"weigh": {"kernel": kernel, "bias": bias}}}
    if model.position == "learned" and table is not None:
        grid = data.trained_height // model.patch, data.trained_width // model.patch
        found["position"] = {"table": table.reshape(*grid, -1)}
    return found
