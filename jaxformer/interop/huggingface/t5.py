"""T5: text to text, with biases by distance that all layers share."""

from __future__ import annotations

from jaxformer.interop.huggingface.page import Page
from jaxformer.interop.huggingface.port import Port, rewrite
from jaxformer.interop.layout import Layout, Rule, attention, layers, linear, norm
from jaxformer.models.encoder_decoder import EncoderDecoder
from jaxformer.nn.activation import GELU_TANH, RELU
from jaxformer.nn.attention import Attention
from jaxformer.nn.block import Block, CrossBlock, PreNorm, Stack
from jaxformer.nn.heads import lm_head
from jaxformer.nn.make import Make
from jaxformer.nn.mlp import MLP, GatedMLP
from jaxformer.nn.norm import RMSNorm
from jaxformer.nn.relative import BucketBias

ATTENTION = ("q", "k", "v", "o")
MLPS = {
    "relu": Make(MLP, activation=RELU, use_bias=False),
    "gated-gelu": Make(GatedMLP, activation=GELU_TANH),
}


def t5(page: Page, dtype: str) -> Port:
    """Raffel et al. 2019, arXiv 1910.10683; with gated-gelu and a head of its own, version 1.1."""
    width, vocabulary = page.integer("d_model"), page.integer("vocab_size")
    heads, depth = page.integer("num_heads"), page.depth("num_layers")
    decoder_depth = page.integer("num_decoder_layers", depth, most=10_000)
    dropout = page.number("dropout_rate", 0.1)
    kind = page.text("feed_forward_proj", "relu")
    if kind not in MLPS:
        raise page.unsupported("feed_forward_proj", MLPS)
    gated = kind == "gated-gelu"
    mlp = Make(MLPS[kind].cls, **dict(MLPS[kind].arguments), hidden=page.integer("d_ff"))
    rms_norm = Make(RMSNorm, epsilon=page.number("layer_norm_epsilon", 1e-6))
    mixer = Make(
        Attention,
        heads=heads,
        head_size=page.integer("d_kv"),
        scale=1.0,
        use_bias=False,
        dropout=dropout,
    )
    residual = Make(PreNorm, norm=rms_norm, dropout=dropout)
    scheme = {
        "heads": heads,
        "buckets": page.integer("relative_attention_num_buckets", 32),
        "longest": page.integer("relative_attention_max_distance", 128),
    }
    # A tied head reads a stream that is scaled down; newer files say so by a field of its own.
    tied = page.flag("tie_word_embeddings", True)
    scaled = page.flag("scale_decoder_outputs", tied)
    model = EncoderDecoder(
        vocabulary=vocabulary,
        width=width,
        encoder=Make(Stack, blocks=(Make(Block, mixer=mixer, mlp=mlp, residual=residual),) * depth),
        decoder=Make(
            Stack,
            blocks=(Make(CrossBlock, mixer=mixer, cross=mixer, mlp=mlp, residual=residual),)
            * decoder_depth,
        ),
        encoder_scheme=Make(BucketBias, both_ways=True, **scheme),
        decoder_scheme=Make(BucketBias, both_ways=False, **scheme),
        norm=rms_norm,
        head=None if tied else lm_head(vocabulary),
        gain=width**-0.5 if scaled else 1.0,
        dropout=dropout,
        dtype=dtype,
    )
    rules = (
        Rule("embed/table", "shared.weight"),
        *_side("encoder", depth, ("mixer", "mlp"), gated),
        *_side("decoder", decoder_depth, ("mixer", "cross", "mlp"), gated),
        *(() if tied else linear("output", "lm_head", bias=False)),
    )
    copies = r"^(en|de)coder\.embed_tokens\.weight$" + (r"|^lm_head\.weight$" if tied else "")
    # A bias that the authors' code made and never used.
    unused = r"|decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias"
    return rewrite(model, Layout(rules, "", copies + unused))


def _side(side: str, depth: int, branches: tuple[str, ...], gated: bool) -> tuple[Rule, ...]:
    """The rules of the encoder or the decoder."""
    names = {"mixer": "SelfAttention", "cross": "EncDecAttention", "mlp": "DenseReluDense"}
    parts = (
        (("gate", "wi_0"), ("up", "wi_1"), ("down", "wo"))
        if gated
        else (("up", "wi"), ("down", "wo"))
    )
    block: tuple[Rule, ...] = ()
    for i, branch in enumerate(branches):
        ours = f"{side}_stack/block_{{}}/{branch}"
        theirs = f"{side}.block.{{}}.layer.{i}"
        inside = f"{theirs}.{names[branch]}"
        block += norm(f"{ours}_residual/norm", f"{theirs}.layer_norm", bias=False)
        if branch == "mlp":
            for mine, name in parts:
                block += linear(f"{ours}/{mine}", f"{inside}.{name}", bias=False)
        else:
            block += attention(ours, inside, ATTENTION, bias=False)
    table = f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    return (
        *layers(depth, *block),
        Rule(f"{side}_bias/table", table),
        *norm(f"{side}_norm", f"{side}.final_layer_norm", bias=False),
    )
