"""The authors' parameter names as ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from jaxformer.interop.authors import Tree, Weights, from_heads, linear, norm, to_heads

ABLATE = {
    "NO_ABLATION": "none",
    "ABLATE_ATTN_LINEAR": "out",
    "ABLATE_ATTN_LINEAR_PROJV": "value_out",
}


def model_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of the authors' `Transformer` as those of `model.searcher`."""
    return {
        "words": config["words"],
        "length": config["seq_len"],
        "hidden": config["dims"] - config["words"],
        "depth": config["layers"],
        "heads": config["heads"],
        "rate": config["rate"],
        "ablate": ABLATE[config["ablate"]],
        "causal": not config["bidirectional"],
    }


def read(config: ConfigDict, weights: Weights) -> Tree:
    """A checkpoint as the model of a config."""
    return searcher(weights, config.model.depth, config.model.heads, config.model.ablate)


def searcher(weights: Weights, layers: int, heads: int, ablate: str = "none") -> Tree:
    """Their `Transformer`; ablations leave out what they do not use."""

    def one(i: int) -> Tree:
        name = f"transformers.{i}."
        parts = {"query": "proj_q", "key": "proj_k", "value": "proj_v"}
        if ablate == "value_out":
            del parts["value"]
        mixer = {
            ours: to_heads(linear(weights, f"{name}attn.{theirs}"), heads)
            for ours, theirs in parts.items()
        }
        found: Tree = {"mixer": mixer}
        if ablate == "none":
            mixer["out"] = from_heads(linear(weights, f"{name}attn.linear"), heads)
        if ablate != "value_out":
            found["mixer_residual"] = {"norm": norm(weights, f"{name}ln_attn")}
        if ablate == "none" or i < layers - 1:
            found["mlp_residual"] = {"norm": norm(weights, f"{name}ln_ff")}
            up, down = (linear(weights, f"{name}ff.{part}") for part in (0, 3))
            found["mlp"] = {"up": up, "down": down}
        return found

    stack = {f"block_{i}": one(i) for i in range(layers)}
    return {"stack": stack, "norm": norm(weights, "ln_head")}
