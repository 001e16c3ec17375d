"""The authors' names for the layer (`elicassion/3DTRL`, model/three_d_trl.py)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

from jaxformer.interop.authors import linear


def tokens3d(
    weights: Mapping[str, jax.Array], *, source: str, depth: bool, concat: bool
) -> dict[str, Any]:
    """Parameters of `Tokens3D`."""
    props = "estimator.camera_props"

    def mlp(prefix: str) -> dict[str, Any]:
        return {"in": linear(weights, f"{prefix}.0"), "out": linear(weights, f"{prefix}.2")}

    pose: dict[str, Any] = {
        "mix": mlp(f"{props}.mix_proj"),
        "rotation": linear(weights, f"{props}.rot"),
        "translation": linear(weights, f"{props}.trans"),
    }
    if source in ("both-sep", "cls"):
        pose["class"] = mlp(f"{props}.cls_proj")
    if source != "cls":
        names = {"in": "token_proj_1.0", "out": "token_proj_2.0"}
        pose["tokens"] = {name: linear(weights, f"{props}.{of}") for name, of in names.items()}
    found = {
        "depth" if depth else "point": mlp("estimator.camera_coord.net"),
        "pose": pose,
        "embed": mlp("proj_world" if concat else "pos_emb_world"),
    }
    if "pos_emb_world_cls" in weights:
        found["class_embed"] = weights["pos_emb_world_cls"][0]
    return found
