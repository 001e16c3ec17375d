"""The authors' parameter names as ours."""

from __future__ import annotations

from ml_collections import ConfigDict

from jaxformer.interop.authors import Tree, Weights, block, linear, multihead_attention, norm


def read(config: ConfigDict, weights: Weights) -> Tree:
    """`TransformerModel` as the set transformer of a config."""
    return set_transformer(weights, config.model.heads, config.model.depth)


def set_transformer(weights: Weights, heads: int, layers: int) -> Tree:
    """`TransformerModel` as a `SetTransformer`."""

    def one(i: int) -> Tree:
        name = f"transformer_encoder.layers.{i}"
        return block(
            multihead_attention(weights, f"{name}.self_attn", heads),
            norm(weights, f"{name}.norm1"),
            linear(weights, f"{name}.linear1"),
            linear(weights, f"{name}.linear2"),
            norm(weights, f"{name}.norm2"),
        )

    return {
        "x_encoder": linear(weights, "encoder"),
        "y_encoder": {"linear": linear(weights, "y_encoder")},
        "stack": {f"block_{i}": one(i) for i in range(layers)},
        "up": linear(weights, "decoder.0"),
        "head": linear(weights, "decoder.2"),
    }
