"""Our values for the golden cases of `urpe`."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from jaxformer.kernels.attention import Causal, Full, KeyPadding
from jaxformer.models.transformer import Transformer
from jaxformer.nn.attention import Attention, Softmax, Unfused
from jaxformer.nn.block import Block
from jaxformer.nn.make import Make
from jaxformer.nn.relative import TableScheme
from jaxformer.papers.urpe import authors
from jaxformer.papers.urpe.model import Buckets, PaddedEmbed, Unique, encoder


def mha(case):
    c = case.config
    offsets, layer = Unique(c["T"]), Attention(c["num_heads"])

    def main(weights, inputs, mask=None, weigh=True, layer=layer, **options):
        b, c = inputs["b_table"].T, inputs["c_table"].T
        scheme = TableScheme(offsets, offsets.length - 1, b, c if weigh else None, strict=True)
        params = authors.attention(weights, "", layer.heads)
        x = inputs["x"].swapaxes(0, 1)
        return layer.apply({"params": params}, x, mask=mask or Full(), scheme=scheme, **options)

    def plain(weights, inputs):
        return main(weights, inputs).swapaxes(0, 1)

    def again(**how):
        return main(case.weights, case.inputs, **how).swapaxes(0, 1)

    _, seen = main(
        case.weights,
        case.inputs,
        layer=Attention(layer.heads, core=Make(Unfused)),
        capture_intermediates=lambda module, _: isinstance(module, Softmax),
    )
    (p,) = seen["intermediates"]["core"]["softmax"]["__call__"]
    valid = case.inputs["key_padding_mask"] == 0
    return {
        **case.outputs_and_gradients(plain),
        "out/attn_weights": p.swapaxes(0, 1),
        "out/padded": again(mask=KeyPadding(valid)),
        "out/causal": again(mask=Causal()),
        "out/rpe_only": again(weigh=False),
    }


def sentence_encoder(case):
    c = case.config
    heads, layers = c["num_attention_heads"], c["num_encoder_layers"]
    buckets = Buckets(c["max_seq_len"], c["rp_bucket"], c["max_rp"])
    offsets = Unique(c["max_seq_len"]) if c["rel_pos_unique"] else buckets
    trunk = Transformer(
        width=c["embedding_dim"],
        depth=layers,
        heads=heads,
        hidden=c["ffn_embedding_dim"],
        order="post",
        position="none",
    )
    model = encoder(trunk, vocabulary=c["vocab_size"], offsets=offsets, pad=c["padding_idx"])()

    def apply(weights, inputs, **options):
        params = authors.sentence_encoder(weights, heads, layers)
        valid = inputs["tokens"] != c["padding_idx"]
        return model.apply({"params": params}, inputs["tokens"], valid_BxL=valid, **options)

    def main(weights, inputs):
        return apply(weights, inputs).swapaxes(0, 1)

    def is_state(module, _):
        return isinstance(module, Block | PaddedEmbed)

    out, seen = apply(case.weights, case.inputs, capture_intermediates=is_state)
    seen = seen["intermediates"]
    states = [seen["embed"], *(seen["stack"][f"block_{i}"] for i in range(layers))]
    states = jnp.stack([state["__call__"][0].swapaxes(0, 1) for state in states])
    at = np.arange(c["T"])
    return {
        **case.outputs_and_gradients(main),
        "out/sentence_rep": out[:, 0],
        "out/states": states,
        "out/bucket": offsets(at[None, :] - at[:, None]),
        "out/signed_bucket_m200_200": buckets.signed(np.arange(-200, 201)),
    }


PORTS = {
    "mha": mha,
    "encoder_unique": sentence_encoder,
    "encoder_bucketed": sentence_encoder,
}
