"""Parameter names of `net.py` of licong-lin/in-context-rl as ours."""

from __future__ import annotations

from ml_collections import ConfigDict

from jaxformer.interop.authors import Tree, Weights, block, gpt2_block, linear, norm


def read(config: ConfigDict, weights: Weights) -> Tree:
    """Its weights as the parameters of a config's model."""
    model = config.model
    return transformer(weights, model.backbone, model.depth, model.heads)


def relu_blocks(weights: Weights, prefix: str, layers: int) -> Tree:
    """Blocks of its `DecoderTransformerBackbone`; `prefix` is empty or ends with a dot."""

    def project(name: str) -> Tree:
        return {"kernel": linear(weights, prefix + name)["kernel"][:, None]}

    def one(i: int) -> Tree:
        names = {"query": f"_queries.{i}", "key": f"_keys.{i}", "value": f"_values.{i}"}
        return block(
            {part: project(name) for part, name in names.items()},
            norm(weights, f"{prefix}_lns_1.{i}"),
            linear(weights, f"{prefix}_mlps.{i}.0"),
            linear(weights, f"{prefix}_mlps.{i}.2"),
            norm(weights, f"{prefix}_lns_2.{i}"),
        )

    return {f"block_{i}": one(i) for i in range(layers)}


def transformer(weights: Weights, backbone: str, layers: int, heads: int) -> Tree:
    """Its `Transformer` as a `BanditTransformer`."""
    decoder: Tree = {
        "embed": linear(weights, "embed_transition"),
        "position": {"table": weights["transformer.wpe.weight"]},
    }
    if backbone == "relu":
        decoder["stack"] = relu_blocks(weights, "transformer.", layers)
    else:
        names = [f"transformer.h.{i}." for i in range(layers)]
        blocks = [gpt2_block(weights, name, heads) for name in names]
        decoder["stack"] = {f"block_{i}": each for i, each in enumerate(blocks)}
        decoder["norm"] = norm(weights, "transformer.ln_f")
    return {"decoder": decoder, "head": linear(weights, "pred_actions")}
