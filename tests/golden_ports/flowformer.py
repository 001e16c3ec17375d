"""Our values for the golden cases of `flowformer`."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxformer.kernels.attention import Full
from jaxformer.models.lm import decoder_lm
from jaxformer.models.transformer import Transformer
from jaxformer.nn.activation import GELU
from jaxformer.nn.block import Block, PreNorm
from jaxformer.nn.make import Make
from jaxformer.nn.mlp import MLP
from jaxformer.nn.norm import LayerNorm
from jaxformer.papers.flowformer import authors, model


def project(params, name, x):
    layer = params[name]
    return jnp.einsum("...D,DHK->...HK", x, layer["kernel"]) + layer["bias"]


def attention_case(case):
    """`Flow_Attention*`: widths of input, model and output differ, so the map is spelt out."""
    causal = "Causal" in case.config["module"]
    heads = case.config["n_heads"]

    def features(weights, inputs):
        params = authors.attention(weights, "", heads)
        q, k = (
            jax.nn.sigmoid(project(params, ours, inputs[theirs]))
            for ours, theirs in (("query", "queries"), ("key", "keys"))
        )
        return params, q, k, project(params, "value", inputs["values"])

    def main(weights, inputs):
        params, q, k, v = features(weights, inputs)
        y = model.attend_causally(q, k, v)[0] if causal else model.attend(q, k, v)
        out = params["out"]
        return jnp.einsum("...HK,HKD->...D", y, out["kernel"]) + out["bias"]

    _, q, k, v = features(case.weights, case.inputs)
    ones = jnp.ones_like(v)
    if causal:
        # With c = 1 and V = 1 the output is the allocation itself (a row of A sums to 1).
        allocation = model.attend_causally(q, k, ones, compete=False, epsilon=0.0)[0][..., 0]
        flow = causal_flow(q, k)
    else:
        flow = model.conserve(q, k)
        allocation = jax.nn.sigmoid(flow.sink_BxLxH * q.shape[1] / k.shape[1])
    source = flow.source_BxSxH
    return {
        **case.outputs_and_gradients(main),
        "out/sink_allocation": allocation.swapaxes(1, 2),
        "out/conserved_source_raw": source.swapaxes(1, 2),
        "out/conserved_source_clamped": source.clip(-1, 1).swapaxes(1, 2),
    }


def causal_flow(q, k):
    """The conserved source flow of the causal form, from the states it decodes through."""
    state = model.State.empty(q.shape[0], *q.shape[2:])
    advance = jax.jit(model.attend_causally)
    sources = []
    for t in range(q.shape[1]):
        now = (x[:, t : t + 1] for x in (q, k, k))
        state = advance(*now, state)[1]
        edges = (k[:, t : t + 1] + model.EPSILON) * (state.q_in + model.EPSILON)
        sources.append(edges.sum(-1) / (t + 1))
    return model.Flow(None, None, jnp.concatenate(sources, 1))


def vision_block(case):
    """The block always has 12 heads, whatever the config of the model around it says."""
    heads, norm = case.config["num_heads"], Make(LayerNorm, epsilon=case.config["norm_eps"])
    hidden = round(case.config["dim"] * case.config["mlp_ratio"])
    block = Block(
        mixer=Make(model.FlowAttention, heads=heads),
        mlp=Make(MLP, hidden=hidden, activation=GELU),
        residual=Make(PreNorm, norm=norm),
        mlp_residual=Make(PreNorm, norm=norm, layer_scale=1.0),
    )

    def main(weights, inputs):
        params = authors.vision_block(weights, heads)
        return block.apply({"params": params}, inputs["x"], mask=Full())

    params = authors.vision_block(case.weights, heads)
    normed = norm().apply({"params": params["mixer_residual"]["norm"]}, case.inputs["x"])
    mixer = model.FlowAttention(heads=heads)
    attended = mixer.apply({"params": params["mixer"]}, normed, mask=Full())
    return {**case.outputs_and_gradients(main), "out/attn_out": attended}


def gpt(case):
    c = case.config
    trunk = Transformer(width=c["n_embd"], depth=c["n_layer"], heads=c["n_head"], mlp="gelu_tanh")
    mixer = Make(model.FlowAttention, heads=c["n_head"])
    lm = decoder_lm(
        trunk, vocabulary=c["vocab_size"], length=c["block_size"], tied=False, mixer=mixer
    )

    def main(weights, inputs):
        params = authors.language_model(weights, c["n_head"], c["n_layer"])
        return lm.apply({"params": params}, inputs["idx"])

    found = case.outputs_and_gradients(main)
    targets = case.inputs["targets"]
    likely = jax.nn.log_softmax(found["out/main"])
    picked = jnp.take_along_axis(likely, jnp.maximum(targets, 0)[..., None], -1)[..., 0]
    scored = targets >= 0
    return {**found, "out/loss": -(picked * scored).sum() / scored.sum()}


PORTS = {
    "bidirectional": attention_case,
    "cross": attention_case,
    "causal": attention_case,
    "vision_block": vision_block,
    "gpt": gpt,
}
