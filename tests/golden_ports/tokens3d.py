"""Our values for the golden cases of `tokens3d`."""

from __future__ import annotations

import numpy as np

from jaxformer.evaluation.alignment import alignment_error, cycle_error, kendalls_tau, nearest
from jaxformer.papers.tokens3d import authors
from jaxformer.papers.tokens3d.model import Tokens3D
from jaxformer.tasks.contrastive import time_contrastive


def layer(case):
    c = case.config
    side = c["input_size"][1] // c["patch_size"]
    concat = c["module"].endswith("Cat")
    how = {"source": c["pred_campos_from"], "depth": c["pred_depth"], "concat": concat}
    module = Tokens3D(**how, class_token=c["has_cls"], grid=(side, side))

    def apply(weights, inputs, **options):
        params = authors.tokens3d(weights, **how)
        given = inputs.get("pos_emb_2d")
        position = None if given is None else lambda x: x + given
        return module.apply({"params": params}, inputs["x"], position=position, **options)

    _, seen = apply(case.weights, case.inputs, mutable="intermediates")
    found = {name: value[0] for name, value in seen["intermediates"].items()}
    at = {
        "out/camera_coord": found["p"],
        "out/rotation": found["R"],
        "out/translation": found["t"][:, None],
        "out/world_coord": found["P"],
    }
    if c["pred_depth"]:
        at["out/depth"] = found["p"][..., 2:]
    return {**case.outputs_and_gradients(apply), **at}


def alignment(case):
    def main(weights, inputs):
        del weights
        return time_contrastive(inputs["trip1"], inputs["trip2"], slip=True)

    z1, z2 = (np.asarray(case.inputs[name]) for name in ("z1", "z2"))
    return {
        **case.outputs_and_gradients(main),
        "out/nearest": nearest(z1, z2),
        "out/alignment_error": alignment_error(z1, z2),
        "out/cycle_error": cycle_error(z1, z2),
        "out/kendalls_tau": kendalls_tau(z1, z2),
    }


PORTS = {
    "both_sep": layer,
    "both_avg_xyz": layer,
    "tok_no_cls": layer,
    "cat_cls": layer,
    "alignment": alignment,
}
