"""Image classifiers: ViT, DeiT with its distillation token, Swin."""

from __future__ import annotations

from jaxformer.interop.huggingface.page import Page
from jaxformer.interop.huggingface.port import Port, look
from jaxformer.interop.layout import Layout, Rule, attention, layers, linear, norm
from jaxformer.models import swin as swin_model
from jaxformer.models.encoder import Classifier, Encoder
from jaxformer.nn.attention import Attention
from jaxformer.nn.block import Block, PreNorm, Stack
from jaxformer.nn.heads import FirstToken, FirstTokens, TokenHeads
from jaxformer.nn.make import Make
from jaxformer.nn.mlp import MLP
from jaxformer.nn.norm import LayerNorm
from jaxformer.nn.patch import PatchEmbed
from jaxformer.nn.position import LearnedPosition

VIT_ATTENTION = ("attention.query", "attention.key", "attention.value", "output.dense")
SWIN_ATTENTION = ("self.query", "self.key", "self.value", "output.dense")


def vit(page: Page, dtype: str) -> Port:
    """Dosovitskiy et al. 2020, and DeiT (Touvron et al. 2020): a second token, a second head."""
    kind = page.text("model_type")
    size, patch = page.integer("image_size", 224), page.integer("patch_size", 16)
    if size % patch:
        raise page.wrong("image_size", f"a multiple of patch_size={patch}")
    depth, width = page.depth("num_hidden_layers"), page.integer("hidden_size")
    qkv_bias = page.flag("qkv_bias", True)
    dropout = page.number("hidden_dropout_prob", 0.0)
    layer_norm = Make(LayerNorm, epsilon=page.number("layer_norm_eps", 1e-12))
    tokens = 2 if kind == "deit" else 1
    block = Make(
        Block,
        mixer=Make(
            Attention,
            heads=page.integer("num_attention_heads"),
            use_bias=qkv_bias,
            out_bias=True,
            dropout=page.number("attention_probs_dropout_prob", 0.0),
        ),
        mlp=Make(
            MLP,
            hidden=page.integer("intermediate_size"),
            activation=page.activation("hidden_act", "gelu"),
        ),
        residual=Make(PreNorm, norm=layer_norm, dropout=dropout),
    )
    encoder = Make(
        Encoder,
        embed=Make(PatchEmbed, patch=patch, width=width, dtype=dtype),
        stack=Make(Stack, blocks=(block,) * depth),
        position=Make(LearnedPosition, length=(size // patch) ** 2 + tokens),
        norm=layer_norm,
        class_tokens=tokens,
        dropout=dropout,
    )
    ours, theirs = "encoder/stack/block_{}", f"{kind}.encoder.layer.{{}}"
    embeddings = f"{kind}.embeddings"
    names = (f"{embeddings}.cls_token", f"{embeddings}.distillation_token")
    rules = (
        Rule("encoder/class_tokens", names[:tokens], "n 1 1 d -> n d"),
        Rule("encoder/position/table", f"{embeddings}.position_embeddings", "1 n d -> n d"),
        *linear(
            "encoder/embed/projection",
            f"{embeddings}.patch_embeddings.projection",
            "d c p q -> p q c d",
        ),
        *layers(
            depth,
            *norm(f"{ours}/mixer_residual/norm", f"{theirs}.layernorm_before"),
            *attention(
                f"{ours}/mixer", f"{theirs}.attention", VIT_ATTENTION, bias=qkv_bias, out_bias=True
            ),
            *norm(f"{ours}/mlp_residual/norm", f"{theirs}.layernorm_after"),
            *linear(f"{ours}/mlp/up", f"{theirs}.intermediate.dense"),
            *linear(f"{ours}/mlp/down", f"{theirs}.output.dense"),
        ),
        *norm("encoder/norm", f"{kind}.layernorm"),
    )
    classes = page.classes()
    if page.architecture == "DeiTForImageClassificationWithTeacher":
        heads = ("cls_classifier", "distillation_classifier")
        rules += (
            Rule("head/head/kernel", tuple(f"{h}.weight" for h in heads), "t c d -> t d c"),
            Rule("head/head/bias", tuple(f"{h}.bias" for h in heads), "t c -> t c"),
        )
        pool, head = Make(FirstTokens, count=2), Make(TokenHeads, classes=classes)
        model = Classifier(encoder, classes, pool, head)
    else:
        rules += linear("head", "classifier")
        model = Classifier(encoder, classes, Make(FirstToken))
    layout = Layout(rules, f"{kind}.", r"\.pooler\.")
    return look(model, layout, size, page.integer("num_channels", 3))


def swin(page: Page, dtype: str) -> Port:
    """Liu et al. 2021."""
    page.require("use_absolute_embeddings", False)
    depths, heads = page.integers("depths"), page.integers("num_heads")
    size, patch = page.integer("image_size", 224), page.integer("patch_size", 4)
    window = page.integer("window_size", 7)
    qkv_bias = page.flag("qkv_bias", True)
    if len(depths) != len(heads):
        raise page.wrong("num_heads", f"as long as depths={list(depths)}")
    if (size // patch) >> (len(depths) - 1) < window or size % patch:
        raise page.wrong("image_size", f"a multiple of patch_size with {window} patches at the end")
    model = swin_model.swin(
        image_size=size,
        patch=patch,
        width=page.integer("embed_dim", 96),
        depths=depths,
        heads=heads,
        window=window,
        classes=page.classes(),
        mlp_ratio=page.number("mlp_ratio", 4.0),
        qkv_bias=qkv_bias,
        activation=page.activation("hidden_act", "gelu"),
        epsilon=page.number("layer_norm_eps", 1e-5),
        dropout=page.number("hidden_dropout_prob", 0.0),
        attention_dropout=page.number("attention_probs_dropout_prob", 0.0),
        drop_path=page.number("drop_path_rate", 0.1),
        dtype=dtype,
    )
    rules: tuple[Rule, ...] = (
        *linear(
            "encoder/embed/projection",
            "swin.embeddings.patch_embeddings.projection",
            "d c p q -> p q c d",
        ),
        *norm("encoder/embed_norm", "swin.embeddings.norm"),
    )
    for stage, depth in enumerate(depths):
        ours, theirs = (
            f"encoder/stage_{stage}/block_{{}}",
            f"swin.encoder.layers.{stage}.blocks.{{}}",
        )
        table = "attention.self.relative_position_bias_table"
        rules += layers(
            depth,
            *norm(f"{ours}/mixer_residual/norm", f"{theirs}.layernorm_before"),
            *attention(
                f"{ours}/mixer/mixer",
                f"{theirs}.attention",
                SWIN_ATTENTION,
                bias=qkv_bias,
                out_bias=True,
            ),
            Rule(f"{ours}/mixer/mixer/position/table", f"{theirs}.{table}"),
            *norm(f"{ours}/mlp_residual/norm", f"{theirs}.layernorm_after"),
            *linear(f"{ours}/mlp/up", f"{theirs}.intermediate.dense"),
            *linear(f"{ours}/mlp/down", f"{theirs}.output.dense"),
        )
        if stage:
            merge, before = f"encoder/merge_{stage}", f"swin.encoder.layers.{stage - 1}.downsample"
            rules += (
                *norm(f"{merge}/norm", f"{before}.norm"),
                *linear(f"{merge}/reduction", f"{before}.reduction", bias=False),
            )
    rules += (*norm("encoder/norm", "swin.layernorm"), *linear("head", "classifier"))
    layout = Layout(rules, "swin.", r"\.relative_position_index$|attn_mask$")
    return look(model, layout, size, page.integer("num_channels", 3))
