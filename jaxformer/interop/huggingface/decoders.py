"""Decoder-only language models: GPT-2, LLaMA 2 and 3, Mistral, Qwen2."""

from __future__ import annotations

from jaxformer.interop.huggingface.page import Page
from jaxformer.interop.huggingface.port import Port, language
from jaxformer.interop.layout import Layout, Rule, attention, layers, linear, norm
from jaxformer.kernels.attention import Full, Window
from jaxformer.models.lm import DecoderLM
from jaxformer.nn.attention import Attention
from jaxformer.nn.block import Block, PreNorm, Stack
from jaxformer.nn.heads import lm_head
from jaxformer.nn.make import Make
from jaxformer.nn.mlp import MLP, GatedMLP
from jaxformer.nn.norm import LayerNorm, RMSNorm
from jaxformer.nn.position import LearnedPosition, RoPE
from jaxformer.nn.rotary import BandScaling, DynamicScaling, Frequencies, LinearScaling, YaRN


def gpt2(page: Page, dtype: str) -> Port:
    """Radford et al. 2019. Its matrices are (in, out), queries, keys and values one of them."""
    page.require("scale_attn_weights", True)
    page.require("scale_attn_by_inverse_layer_idx", False)
    page.require("add_cross_attention", False)
    width, depth = page.integer("n_embd"), page.depth("n_layer")
    tied = page.flag("tie_word_embeddings", True)
    vocabulary, length = page.integer("vocab_size"), page.integer("n_positions", 1024)
    layer_norm = Make(LayerNorm, epsilon=page.number("layer_norm_epsilon", 1e-5))
    block = Make(
        Block,
        mixer=Make(Attention, heads=page.integer("n_head"), dropout=page.number("attn_pdrop", 0.1)),
        mlp=Make(
            MLP,
            hidden=page.integer("n_inner", 4 * width),
            activation=page.activation("activation_function", "gelu_new"),
        ),
        residual=Make(PreNorm, norm=layer_norm, dropout=page.number("resid_pdrop", 0.1)),
    )
    model = DecoderLM(
        vocabulary=vocabulary,
        width=width,
        stack=Make(Stack, blocks=(block,) * depth),
        position=Make(LearnedPosition, length=length),
        norm=layer_norm,
        head=None if tied else lm_head(vocabulary),
        dropout=page.number("embd_pdrop", 0.1),
        dtype=dtype,
    )
    ours, theirs = "stack/block_{}", "transformer.h.{}"
    fused = tuple(f"{ours}/mixer/{part}" for part in ("query", "key", "value"))
    rules = (
        Rule("embed/table", "transformer.wte.weight"),
        Rule("position/table", "transformer.wpe.weight"),
        *layers(
            depth,
            *norm(f"{ours}/mixer_residual/norm", f"{theirs}.ln_1"),
            Rule(
                tuple(f"{name}/kernel" for name in fused),
                f"{theirs}.attn.c_attn.weight",
                "d (n h k) -> n d h k",
            ),
            Rule(
                tuple(f"{name}/bias" for name in fused),
                f"{theirs}.attn.c_attn.bias",
                "(n h k) -> n h k",
            ),
            Rule(f"{ours}/mixer/out/kernel", f"{theirs}.attn.c_proj.weight", "(h k) d -> h k d"),
            Rule(f"{ours}/mixer/out/bias", f"{theirs}.attn.c_proj.bias"),
            *norm(f"{ours}/mlp_residual/norm", f"{theirs}.ln_2"),
            Rule(f"{ours}/mlp/up/kernel", f"{theirs}.mlp.c_fc.weight"),
            Rule(f"{ours}/mlp/up/bias", f"{theirs}.mlp.c_fc.bias"),
            Rule(f"{ours}/mlp/down/kernel", f"{theirs}.mlp.c_proj.weight"),
            Rule(f"{ours}/mlp/down/bias", f"{theirs}.mlp.c_proj.bias"),
        ),
        *norm("norm", "transformer.ln_f"),
        *(() if tied else linear("head", "lm_head", bias=False)),
    )
    buffers = r"\.attn\.(masked_)?bias$" + (r"|^lm_head\.weight$" if tied else "")
    return language(model, Layout(rules, "transformer.", buffers), length)


def llama(page: Page, dtype: str) -> Port:
    """LLaMA (Touvron et al. 2023) and what follows its layout: Mistral, Qwen2."""
    page.require("pretraining_tp", 1)
    kind = page.text("model_type")
    heads, depth = page.integer("num_attention_heads"), page.depth("num_hidden_layers")
    width, vocabulary = page.integer("hidden_size"), page.integer("vocab_size")
    length = page.integer("max_position_embeddings", 2048)
    tied = page.flag("tie_word_embeddings", False)
    qkv_bias = kind == "qwen2" or page.flag("attention_bias", False)
    out_bias = kind != "qwen2" and qkv_bias
    mlp_bias = page.flag("mlp_bias", False)
    rms_norm = Make(RMSNorm, epsilon=page.number("rms_norm_eps", 1e-6))
    windows = _windows(page, depth)

    def block(layer: int) -> Make:
        mixer = Make(
            Attention,
            heads=heads,
            kv_heads=page.integer("num_key_value_heads", heads),
            head_size=page.integer("head_dim", None),
            position=Make(RoPE, frequencies=frequencies(page, length)),
            window=windows[layer],
            use_bias=qkv_bias,
            out_bias=out_bias,
            dropout=page.number("attention_dropout", 0.0),
        )
        mlp = Make(
            GatedMLP,
            hidden=page.integer("intermediate_size"),
            activation=page.activation("hidden_act", "silu"),
            use_bias=mlp_bias,
        )
        return Make(Block, mixer=mixer, mlp=mlp, residual=Make(PreNorm, norm=rms_norm))

    model = DecoderLM(
        vocabulary=vocabulary,
        width=width,
        stack=Make(Stack, blocks=tuple(map(block, range(depth)))),
        norm=rms_norm,
        head=None if tied else lm_head(vocabulary),
        dtype=dtype,
    )
    ours, theirs = "stack/block_{}", "model.layers.{}"
    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    parts = (("gate", "gate_proj"), ("up", "up_proj"), ("down", "down_proj"))
    rules = (
        Rule("embed/table", "model.embed_tokens.weight"),
        *layers(
            depth,
            *norm(f"{ours}/mixer_residual/norm", f"{theirs}.input_layernorm", bias=False),
            *attention(
                f"{ours}/mixer", f"{theirs}.self_attn", names, bias=qkv_bias, out_bias=out_bias
            ),
            *norm(f"{ours}/mlp_residual/norm", f"{theirs}.post_attention_layernorm", bias=False),
            *(
                rule
                for mine, name in parts
                for rule in linear(f"{ours}/mlp/{mine}", f"{theirs}.mlp.{name}", bias=mlp_bias)
            ),
        ),
        *norm("norm", "model.norm", bias=False),
        *(() if tied else linear("head", "lm_head", bias=False)),
    )
    buffers = r"rotary_emb\.inv_freq$" + (r"|^lm_head\.weight$" if tied else "")
    return language(model, Layout(rules, "model.", buffers), length)


def _windows(page: Page, depth: int) -> list[Full | Window]:
    """What each layer sees at most: a query and so many keys before it, less one."""
    size = page.integer("sliding_window", None)
    kind = page.text("model_type")
    if kind == "llama" or size is None:
        return [Full()] * depth
    window, first = Window(size - 1, 0), 0
    if kind == "qwen2":
        used = page.flag("use_sliding_window", False)
        first = page.integer("max_window_layers", 28) if used else depth
    kinds = page.values.get("layer_types") or [
        "sliding_attention" if layer >= first else "full_attention" for layer in range(depth)
    ]
    known = {"full_attention": Full(), "sliding_attention": window}
    if (
        not isinstance(kinds, list | tuple)
        or len(kinds) != depth
        or not set(map(str, kinds)) <= set(known)
    ):
        raise page.wrong("layer_types", f"{depth} of {', '.join(known)}")
    return [known[kind] for kind in kinds]


def frequencies(page: Page, length: int) -> Frequencies:
    """The angles of RoPE: `rope_parameters`, or `rope_theta` and `rope_scaling` of older files."""
    rope = page.section("rope_parameters", "rope_scaling")
    base = rope.number("rope_theta", page.number("rope_theta", 10000.0))
    kind = rope.text("rope_type", rope.text("type", "default"))
    rope.require("partial_rotary_factor", 1, 1.0)
    page.require("partial_rotary_factor", 1, 1.0)
    if kind == "default":
        return Frequencies(base)
    if kind not in ("linear", "dynamic", "llama3", "yarn"):
        raise rope.unsupported("rope_type", ("default", "linear", "dynamic", "llama3", "yarn"))
    before = rope.integer("original_max_position_embeddings", length)
    factor = rope.number("factor", length / before if kind == "yarn" else 1.0)
    if kind == "linear":
        return LinearScaling(base, factor)
    if kind == "dynamic":
        return DynamicScaling(base, factor, length)
    if kind == "llama3":
        low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
        return BandScaling(base, factor, low, high, before)
    rope.require("mscale", 0, rope.values.get("mscale_all_dim"))
    return YaRN(
        base,
        factor,
        before,
        rope.number("beta_fast", 32.0),
        rope.number("beta_slow", 1.0),
        rope.number("attention_factor", 1.0 if rope.values.get("mscale") else None),  # they cancel
        rope.flag("truncate", True),
    )
