"""Bidirectional encoders of text: BERT, RoBERTa, DistilBERT, to words, classes or spans."""

from __future__ import annotations

from typing import Any

from jaxformer.interop.huggingface.page import Page
from jaxformer.interop.huggingface.port import Port, classify, extract, masked
from jaxformer.interop.layout import Layout, Rule, attention, layers, linear, norm
from jaxformer.models.encoder import Classifier, Encoder, MaskedLM
from jaxformer.nn.activation import GELU, RELU, TANH
from jaxformer.nn.attention import Attention
from jaxformer.nn.block import Block, PostNorm, Stack
from jaxformer.nn.embed import Embed, TypedEmbed
from jaxformer.nn.heads import DensePool, EveryPosition, MaskedHead, SpanHead
from jaxformer.nn.make import Make
from jaxformer.nn.mlp import MLP
from jaxformer.nn.norm import LayerNorm
from jaxformer.nn.position import LearnedPosition

BERT_ATTENTION = ("self.query", "self.key", "self.value", "output.dense")
DISTILBERT_ATTENTION = ("q_lin", "k_lin", "v_lin", "out_lin")


def bert(page: Page, dtype: str) -> Port:
    """Devlin et al. 2018, and RoBERTa (Liu et al. 2019), whose first position is row 2."""
    page.require("is_decoder", False)
    page.require("add_cross_attention", False)
    page.require("position_embedding_type", "absolute")
    kind = page.text("model_type")
    depth, vocabulary = page.depth("num_hidden_layers"), page.integer("vocab_size")
    dropout = page.number("hidden_dropout_prob", 0.1)
    layer_norm = Make(LayerNorm, epsilon=page.number("layer_norm_eps", 1e-12))
    offset = page.integer("pad_token_id", 1) + 1 if kind == "roberta" else 0
    length = page.integer("max_position_embeddings", 512) - offset
    encoder = _encoder(
        embed=Make(
            TypedEmbed,
            vocabulary=vocabulary,
            width=page.integer("hidden_size"),
            types=page.integer("type_vocab_size", 2),
            dtype=dtype,
        ),
        position=Make(LearnedPosition, length=length, offset=offset),
        layer_norm=layer_norm,
        depth=depth,
        heads=page.integer("num_attention_heads"),
        hidden=page.integer("intermediate_size"),
        activation=page.activation("hidden_act", "gelu"),
        dropout=dropout,
        attention_dropout=page.number("attention_probs_dropout_prob", 0.1),
    )
    ours, theirs = "encoder/stack/block_{}", f"{kind}.encoder.layer.{{}}"
    trunk = (
        Rule("encoder/embed/words/table", f"{kind}.embeddings.word_embeddings.weight"),
        Rule("encoder/embed/types/table", f"{kind}.embeddings.token_type_embeddings.weight"),
        Rule("encoder/position/table", f"{kind}.embeddings.position_embeddings.weight"),
        *norm("encoder/embed_norm", f"{kind}.embeddings.LayerNorm"),
        *layers(
            depth,
            *attention(f"{ours}/mixer", f"{theirs}.attention", BERT_ATTENTION),
            *norm(f"{ours}/mixer_residual/norm", f"{theirs}.attention.output.LayerNorm"),
            *linear(f"{ours}/mlp/up", f"{theirs}.intermediate.dense"),
            *linear(f"{ours}/mlp/down", f"{theirs}.output.dense"),
            *norm(f"{ours}/mlp_residual/norm", f"{theirs}.output.LayerNorm"),
        ),
    )
    ignored = r"embeddings\.position_ids$"
    if page.architecture.endswith("ForMaskedLM"):
        page.require("tie_word_embeddings", True)
        names = {
            "bert": ("cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm"),
            "roberta": ("lm_head.dense", "lm_head.layer_norm"),
        }[kind]
        bias = {"bert": "cls.predictions", "roberta": "lm_head"}[kind]
        activation = page.activation("hidden_act", "gelu") if kind == "bert" else GELU
        head = Make(MaskedHead, activation=activation, norm=layer_norm)
        rules = (
            *linear("head/dense", names[0]),
            *norm("head/norm", names[1]),
            Rule("head/bias", f"{bias}.bias"),
        )
        # Copies of the tied table and bias, and the head of the other pre-training task.
        ignored += r"|^(cls\.predictions|lm_head)\.decoder\.|^cls\.seq_relationship\.|\.pooler\."
        model = MaskedLM(encoder, head, ("embed", "words", "table"))
        return masked(model, Layout((*trunk, *rules), f"{kind}.", ignored), length)
    if page.architecture.endswith("ForQuestionAnswering"):
        return _extracting(encoder, trunk, f"{kind}.", ignored + r"|\.pooler\.", length)
    pooler, head_name = {
        "bert": ("bert.pooler.dense", "classifier"),
        "roberta": ("classifier.dense", "classifier.out_proj"),
    }[kind]
    rules = (*linear("pool/dense", pooler), *linear("head", head_name))
    model = Classifier(
        encoder,
        page.classes(),
        Make(DensePool, activation=TANH),
        dropout=page.number("classifier_dropout", dropout),
    )
    return classify(model, Layout((*trunk, *rules), f"{kind}.", ignored), length)


def distilbert(page: Page, dtype: str) -> Port:
    """Sanh et al. 2019, arXiv 1910.01108: BERT without types and pooler."""
    depth, length = page.depth("n_layers"), page.integer("max_position_embeddings", 512)
    layer_norm = Make(LayerNorm, epsilon=1e-12)
    encoder = _encoder(
        embed=Make(
            Embed,
            vocabulary=page.integer("vocab_size"),
            width=page.integer("dim"),
            dtype=dtype,
        ),
        position=Make(LearnedPosition, length=length),
        layer_norm=layer_norm,
        depth=depth,
        heads=page.integer("n_heads"),
        hidden=page.integer("hidden_dim"),
        activation=page.activation("activation", "gelu"),
        dropout=page.number("dropout", 0.1),
        attention_dropout=page.number("attention_dropout", 0.1),
    )
    ours, theirs = "encoder/stack/block_{}", "distilbert.transformer.layer.{}"
    trunk = (
        Rule("encoder/embed/table", "distilbert.embeddings.word_embeddings.weight"),
        Rule("encoder/position/table", "distilbert.embeddings.position_embeddings.weight"),
        *norm("encoder/embed_norm", "distilbert.embeddings.LayerNorm"),
        *layers(
            depth,
            *attention(f"{ours}/mixer", f"{theirs}.attention", DISTILBERT_ATTENTION),
            *norm(f"{ours}/mixer_residual/norm", f"{theirs}.sa_layer_norm"),
            *linear(f"{ours}/mlp/up", f"{theirs}.ffn.lin1"),
            *linear(f"{ours}/mlp/down", f"{theirs}.ffn.lin2"),
            *norm(f"{ours}/mlp_residual/norm", f"{theirs}.output_layer_norm"),
        ),
    )
    ignored = r"embeddings\.position_ids$"
    if page.architecture.endswith("ForMaskedLM"):
        page.require("tie_word_embeddings", True)
        head = Make(MaskedHead, activation=page.activation("activation", "gelu"), norm=layer_norm)
        rules = (
            *linear("head/dense", "vocab_transform"),
            *norm("head/norm", "vocab_layer_norm"),
            Rule("head/bias", "vocab_projector.bias"),
        )
        ignored += r"|^vocab_projector\.weight$"
        return masked(
            MaskedLM(encoder, head), Layout((*trunk, *rules), "distilbert.", ignored), length
        )
    if page.architecture.endswith("ForQuestionAnswering"):
        return _extracting(encoder, trunk, "distilbert.", ignored, length)
    rules = (*linear("pool/dense", "pre_classifier"), *linear("head", "classifier"))
    model = Classifier(
        encoder,
        page.classes(),
        Make(DensePool, activation=RELU),
        dropout=page.number("seq_classif_dropout", 0.2),
    )
    return classify(model, Layout((*trunk, *rules), "distilbert.", ignored), length)


def _extracting(
    encoder: Make, trunk: tuple[Rule, ...], prefix: str, ignored: str, length: int
) -> Port:
    """The encoder with a head for where an answer begins and ends."""
    layout = Layout((*trunk, *linear("head/linear", "qa_outputs")), prefix, ignored)
    model = Classifier(encoder, 2, Make(EveryPosition), Make(SpanHead))
    return extract(model, layout, length)


def _encoder(
    *,
    embed: Make,
    position: Make,
    layer_norm: Make,
    depth: int,
    heads: int,
    hidden: int,
    activation: Make,
    dropout: float,
    attention_dropout: float,
) -> Make:
    block: Any = Make(
        Block,
        mixer=Make(Attention, heads=heads, dropout=attention_dropout),
        mlp=Make(MLP, hidden=hidden, activation=activation),
        residual=Make(PostNorm, norm=layer_norm, dropout=dropout),
    )
    return Make(
        Encoder,
        embed=embed,
        stack=Make(Stack, blocks=(block,) * depth),
        position=position,
        embed_norm=layer_norm,
        norm=None,
        dropout=dropout,
    )
