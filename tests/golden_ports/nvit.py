"""Our values for the golden cases of `nvit`."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxformer.compress.prune import Grouped
from jaxformer.kernels.attention import Full
from jaxformer.models.transformer import Transformer
from jaxformer.models.vit import vit
from jaxformer.nn.attention import Attention
from jaxformer.nn.einsum import Einsum
from jaxformer.nn.heads import FirstTokens
from jaxformer.nn.make import Make, swap
from jaxformer.nn.norm import LayerNorm
from jaxformer.nn.position import LearnedPosition
from jaxformer.papers.nvit import authors
from jaxformer.papers.nvit.model import (
    BlockWidths,
    FactoredAttention,
    Factors,
    ModelWidths,
    narrowed,
)


def qkv_prunable(case):
    c = case.config
    out = Einsum("...HK,HKD->...D", (c["emb"],))

    def qkv(weights, inputs):
        params = authors.prunable(weights, "qkv.")
        parts = [
            Einsum("...D,DHK->...HK", (c["head"], size)).apply(
                {"params": params[name]}, inputs["x"]
            )
            for name, size in (("query", c["qk"]), ("key", c["qk"]), ("value", c["v"]))
        ]
        gated = Factors(gates=True).apply({"params": params["factors"]}, *parts)
        return jnp.concatenate([x.reshape(*x.shape[:2], -1) for x in gated], -1)

    def proj(weights, u):
        u = u.reshape(*u.shape[:2], c["head"], c["v"])
        return out.apply({"params": authors.prunable_out(weights, "proj")}, u)

    def weighed(weights, u):
        return jnp.sum(proj(weights, u) * case.inputs["cotangent_proj"])

    by_weight, by_u = jax.grad(weighed, argnums=(0, 1))(case.weights, case.inputs["u"])
    found = case.outputs_and_gradients(qkv)
    return {
        **found,
        **{f"grad_param/{n}": x for n, x in by_weight.items() if n.startswith("proj.")},
        "grad_in/u": by_u,
        "out/proj": proj(case.weights, case.inputs["u"]),
    }


def attention_dense(case):
    c = case.config
    heads = c["num_heads"]
    sizes = {"head_size": c["qk"] // heads, "value_size": c["v"] // heads, "scale": c["scale"]}
    layer = FactoredAttention(heads, **sizes)

    def main(weights, inputs):
        params = authors.attention(weights, "", heads)
        return layer.apply({"params": params}, inputs["x"], mask=Full())

    return case.outputs_and_gradients(main)


def distilled_small(case):
    c = case.config
    rows = zip(c["head"], c["QK"], c["V"], c["MLP"], strict=True)
    widths = ModelWidths(c["EMB"], tuple(BlockWidths(*row) for row in rows))
    whole = vit(
        # Heads of 64, whose scale stays.
        Transformer(64, len(c["QK"]), 1),
        image_size=c["img_size"],
        patch=c["patch_size"],
        classes=c["num_classes"],
    )
    model = narrowed(whole, widths)
    model = swap(model, Attention, FactoredAttention)
    model = swap(model, LayerNorm, Make(LayerNorm, epsilon=c["norm_eps"]))
    positions = Make(LearnedPosition, length=(c["img_size"] // c["patch_size"]) ** 2 + 2)
    encoder = model.encoder.replace(class_tokens=2, position=positions)
    embed = dict(encoder.arguments)["embed"]
    head = Einsum("...TD,TDC->...TC", (c["num_classes"],))

    def both(weights, inputs):
        params = authors.distilled(weights, c["head"], c["patch_size"])
        image = inputs["x"].transpose(0, 2, 3, 1)
        x = encoder().apply({"params": params}, image)
        first = FirstTokens(2).apply({}, x)
        patches = embed().apply({"params": params["embed"]}, image)
        return head.apply({"params": authors.heads(weights)}, first), patches

    def main(weights, inputs):
        logits = both(weights, inputs)[0]
        return logits.reshape(logits.shape[0], -1)

    logits, patches = jax.jit(both)(case.weights, case.inputs)
    return {
        **case.outputs_and_gradients(main),
        "out/cls": logits[:, 0],
        "out/dist": logits[:, 1],
        "out/patch_tokens": patches,
    }


def group_criteria(case):
    found, everyone = {}, []
    for i in range(len(case.config["sizes"])):
        # The embedding, then head, qk, value and mlp of each block.
        size = 16 if i == 0 else (2, 8, 8, 16)[(i - 1) % 4]
        group = Grouped.of(case.inputs[f"scores_{i}"], size)
        found[f"out/order_{i}"] = group.order
        found[f"out/group_sizes_{i}"] = group.sizes
        found[f"out/group_score_{i}"] = group.scores
        everyone.append(group.scores)
    return {**found, "out/main": jnp.sort(jnp.concatenate(everyone))}


PORTS = {
    "qkv_prunable": qkv_prunable,
    "attention_dense": attention_dense,
    "distilled_small": distilled_small,
    "group_criteria": group_criteria,
}
