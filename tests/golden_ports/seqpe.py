"""Our values for the golden cases of `seqpe`."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np

from jaxformer.kernels.attention import Causal, Full
from jaxformer.nn.attention import Attention, Softmax, Unfused
from jaxformer.nn.make import Make
from jaxformer.nn.norm import LayerNorm
from jaxformer.papers.seqpe import authors, losses
from jaxformer.papers.seqpe.encoder import SequentialPE, Strings
from jaxformer.papers.seqpe.model import (
    JOINS,
    AddScores,
    Pair,
    SamePair,
    Vectors,
)


def encoder(case):
    c = case.config
    heads, depth = c["num_attention_heads"], c["layer_num"]
    strings = Strings(c["P"] ** c["data_dim"] if c["data_dim"] > 1 else c["P"], c["data_dim"])
    strings = strings if strings.digits == c["max_digits"] else Strings(c["P"], c["data_dim"])
    assert strings.digits == c["max_digits"]
    g = SequentialPE(
        strings,
        width=c["pe_embed_dim"],
        heads=heads,
        out=c["out_proj_dim"],
        depth=depth,
        causal=c["attn_direction"] == "causal",
        norm=Make(LayerNorm, epsilon=c["layer_norm_epsilon"]),
        last_norm=c["use_last_layernorm"],
        temperature=c["seqpe_temperature"],
    )
    digits = strings(np.asarray(case.inputs["positions"]))
    np.testing.assert_array_equal(digits, case.inputs["digits"])

    def run(weights, g=g, hide=c["mask_padding"]):
        params = authors.encoder(weights, heads, depth)
        return g.apply({"params": params}, digits, case.inputs["pad_mask"] if hide else None)

    return {
        **case.outputs_and_gradients(lambda weights, inputs: run(weights)),
        "out/bidirectional": run(case.weights, dataclasses.replace(g, causal=False)),
        "out/mask_padding": run(case.weights, hide=True),
    }


def contrastive(case):
    c = case.config
    heads = c["num_heads"]

    def main(weights, inputs, heads=heads if c["seqpe_multi_head_loss"] else 1):
        def split(x):  # heads as so many pivots of their own
            x = x.reshape(c["b"], -1, heads, c["d"] // heads)
            return jnp.moveaxis(x, 2, 1).reshape(c["b"] * heads, -1, c["d"] // heads)

        labels = jnp.repeat(inputs["labels"], heads)
        scaled = c["seqpe_logit_scaled_loss"] * split(inputs["pivot"])[:, 0]
        return losses.contrastive(scaled, split(inputs["neg"]), labels).mean()

    return {
        **case.outputs_and_gradients(main),
        "out/multi_head_variant": main({}, case.inputs, heads),
    }


def transfer(case):
    c = case.config
    heads = c["num_heads"]

    def main(weights, inputs, beta=c["beta"], heads=heads if c["seqpe_multi_head_loss"] else 1):
        shape = (c["batch_size"], c["t"], c["d"])
        teacher = inputs["main_pe"][inputs["main_indices"]].reshape(shape)
        scale = c["seqpe_logit_scaled_loss"] ** 0.5
        return losses.transfer(
            scale * teacher, scale * inputs["trans_pe"].reshape(shape), heads, beta
        )

    return {
        **case.outputs_and_gradients(main),
        "out/loss_beta_half": main({}, case.inputs, beta=0.5),
        "out/single_head_variant": main({}, case.inputs, heads=1),
    }


def attend(params, x, pairs, heads, mask, unfused=False):
    """The output, and of the unfused form the probabilities."""
    layer = Attention(heads, core=Make(Unfused)) if unfused else Attention(heads)
    out, seen = layer.apply(
        {"params": params},
        x,
        mask=mask,
        scheme=pairs,
        capture_intermediates=lambda module, _: isinstance(module, Softmax),
    )
    return seen["intermediates"]["core"]["softmax"]["__call__"][0] if unfused else out


def vit_attention(case):
    c = case.config
    heads, size = c["num_heads"], c["dim"] // c["num_heads"]
    of_pair = heads if c["use_pe_multi_head"] else 1

    def main(weights, inputs, unfused=False):
        params = authors.vit_attention(weights, heads)

        def one(how):
            pair = Pair(of_pair, size, how=JOINS[how])
            given = {"params": authors.pair(weights, size)}
            pairs = pair.apply(given, Vectors(inputs["pe"]))
            return attend(params, inputs["x"], pairs, heads, Full(), unfused)

        return jnp.stack([one(how) for how in c["pe_apply_method"]])

    return {
        **case.outputs_and_gradients(main),
        "out/attn": main(case.weights, case.inputs, unfused=True),
    }


def gpt2_attention(case):
    c = case.config
    heads, size = c["num_attention_heads"], c["hidden_size"] // c["num_attention_heads"]
    how = JOINS[c["pe_apply_method"]]
    how = AddScores(c["seqpe_scalar_scale"]) if isinstance(how, AddScores) else how
    mask = Causal() if c["causal"] else Full()
    pair = Pair(heads if c["use_pe_multi_head"] else 1, size, how=how)

    def main(weights, inputs, unfused=False):
        pairs = pair.apply({"params": authors.pair(weights, size)}, Vectors(inputs["pe"]))
        params = authors.gpt2_attention(weights, heads)
        return attend(params, inputs["x"], pairs, heads, mask, unfused)

    params = authors.gpt2_attention(case.weights, heads)
    same = SamePair(heads, how).apply({}, Vectors(case.inputs["pe_shared"]))
    return {
        **case.outputs_and_gradients(main),
        "out/attn": main(case.weights, case.inputs, unfused=True),
        "out/no_pe_qk": attend(params, case.inputs["x"], same, heads, mask),
    }


PORTS = {
    "encoder": encoder,
    "contrastive": contrastive,
    "transfer": transfer,
    "vit_attention": vit_attention,
    "gpt2_attention": gpt2_attention,
}
