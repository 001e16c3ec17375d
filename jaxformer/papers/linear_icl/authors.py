"""Parameter names of `TransformerModel` of dtsip/in-context-learning as ours."""

from __future__ import annotations

from ml_collections import ConfigDict

from jaxformer.interop.authors import Tree, Weights, gpt2_block, linear, norm


def read(config: ConfigDict, weights: Weights) -> Tree:
    """Its weights as the transformer of a config (`experiment` "transformer")."""
    return transformer(weights, config.model.heads, config.model.depth)


def transformer(weights: Weights, heads: int, layers: int) -> Tree:
    """Its weights as the parameters of an `InContextTransformer`."""
    blocks = {f"block_{i}": gpt2_block(weights, f"_backbone.h.{i}.", heads) for i in range(layers)}
    return {
        "decoder": {
            "embed": linear(weights, "_read_in"),
            "position": {"table": weights["_backbone.wpe.weight"]},
            "stack": blocks,
            "norm": norm(weights, "_backbone.ln_f"),
        },
        "head": linear(weights, "_read_out"),
    }
