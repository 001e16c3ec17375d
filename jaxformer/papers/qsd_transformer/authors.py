"""The authors' parameter names as ours: pairs of parameters and running statistics."""

from __future__ import annotations

from collections.abc import Callable

from jaxformer.interop.authors import Tree, Weights, norm

Both = tuple[Tree, Tree]  # parameters, "batch_stats"
Part = Callable[[Weights, str], Both]


def joined(weights: Weights, parts: dict[str, tuple[Part, str]]) -> Both:
    """{our name: (what it is, its name there)} as one module."""
    found = {name: part(weights, theirs) for name, (part, theirs) in parts.items()}
    params = {name: both[0] for name, both in found.items()}
    return params, {name: both[1] for name, both in found.items() if both[1]}


def _lsq(weights: Weights, name: str, kernel: object) -> Both:
    """A layer of `quan_w`: a kernel, its steps, perhaps a bias."""
    bias = {"bias": weights[f"{name}.bias"]} if f"{name}.bias" in weights else {}
    steps = {"scale": weights[f"{name}.alpha"]} if f"{name}.alpha" in weights else {}
    return {"kernel": kernel, **bias, **steps}, {}


def pointwise(weights: Weights, name: str) -> Both:
    """A convolution of size 1, (out, in, 1, 1) or (out, in, 1), or a Linear, as an `Einsum`."""
    kernel = weights[f"{name}.weight"]
    return _lsq(weights, name, kernel.reshape(kernel.shape[:2]).T)


def conv(weights: Weights, name: str) -> Both:
    """A convolution (out, in, size, size)."""
    return _lsq(weights, name, weights[f"{name}.weight"].transpose(2, 3, 1, 0))


def depthwise(weights: Weights, name: str) -> Both:
    """A convolution of each channel by itself, (C, 1, size, size)."""
    return _lsq(weights, name, weights[f"{name}.weight"][:, 0].transpose(1, 2, 0))


def batch_norm(weights: Weights, name: str) -> Both:
    running = {part: weights[f"{name}.running_{part}"] for part in ("mean", "var")}
    return norm(weights, name), running


def padded_norm(weights: Weights, name: str) -> Both:
    return joined(weights, {"norm": (batch_norm, f"{name}.bn")})


def sep_conv(weights: Weights, prefix: str) -> Both:
    """`SepConv`; prefixes end with a dot."""
    parts: dict[str, tuple[Part, str]] = {
        "expand": (pointwise, f"{prefix}pwconv1"),
        "norm_1": (batch_norm, f"{prefix}bn1"),
        "depthwise": (depthwise, f"{prefix}dwconv"),
        "reduce": (pointwise, f"{prefix}pwconv2"),
        "norm_2": (batch_norm, f"{prefix}bn2"),
    }
    return joined(weights, parts)


def conv_block(weights: Weights, prefix: str) -> Both:
    """`MS_ConvBlock`."""
    parts: dict[str, tuple[Part, str]] = {
        "separable": (sep_conv, f"{prefix}Conv."),
        "conv_1": (conv, f"{prefix}conv1"),
        "norm_1": (batch_norm, f"{prefix}bn1"),
        "conv_2": (conv, f"{prefix}conv2"),
        "norm_2": (batch_norm, f"{prefix}bn2"),
    }
    return joined(weights, parts)


def rep_conv(weights: Weights, prefix: str) -> Both:
    """`RepConv`."""
    parts: dict[str, tuple[Part, str]] = {
        "pointwise_1": (pointwise, f"{prefix}body.0"),
        "norm_1": (padded_norm, f"{prefix}body.1"),
        "depthwise": (depthwise, f"{prefix}body.2.0"),
        "pointwise_2": (pointwise, f"{prefix}body.2.1"),
        "norm_2": (batch_norm, f"{prefix}body.2.2"),
    }
    return joined(weights, parts)


def attention(weights: Weights, prefix: str) -> Both:
    """`MS_Attention_RepConv_qkv_id`."""
    parts: dict[str, tuple[Part, str]] = {}
    for ours, theirs in (("query", "q"), ("key", "k"), ("value", "v"), ("out", "proj")):
        parts[ours] = rep_conv, f"{prefix}{theirs}_conv.0."
        parts[f"{ours}_norm"] = batch_norm, f"{prefix}{theirs}_conv.1"
    return joined(weights, parts)


def mlp(weights: Weights, prefix: str) -> Both:
    """`MS_MLP`."""
    parts: dict[str, tuple[Part, str]] = {
        "up": (pointwise, f"{prefix}fc1_conv"),
        "norm_1": (batch_norm, f"{prefix}fc1_bn"),
        "down": (pointwise, f"{prefix}fc2_conv"),
        "norm_2": (batch_norm, f"{prefix}fc2_bn"),
    }
    return joined(weights, parts)


def spike_block(weights: Weights, prefix: str) -> Both:
    """`MS_Block`."""
    params, running = joined(
        weights, {"mixer": (attention, f"{prefix}attn."), "mlp": (mlp, f"{prefix}mlp.")}
    )
    scales = {f"layer_scale_{i}": weights[f"{prefix}layer_scale{i}"] for i in (1, 2)}
    return {**params, **scales}, running


def downsampling(weights: Weights, prefix: str) -> Both:
    """`MS_DownSampling`."""
    parts: dict[str, tuple[Part, str]] = {
        "conv": (conv, f"{prefix}encode_conv"),
        "norm": (batch_norm, f"{prefix}encode_bn"),
    }
    return joined(weights, parts)


DOWN = ("downsample1_1", "downsample1_2", "downsample2", "downsample3", "downsample4")
CONV_BLOCKS = (("ConvBlock1_1.0.",), ("ConvBlock1_2.0.",), ("ConvBlock2_1.0.", "ConvBlock2_2.0."))


def blocks(depths: tuple[int, ...]) -> list[tuple[str, ...]]:
    """Their names of the blocks of each of our five stages; three have a fixed number."""
    third, fourth = (
        tuple(f"block{number}.{i}." for i in range(depth))
        for number, depth in zip((3, 4), depths[3:], strict=True)
    )
    return [*CONV_BLOCKS, third, fourth]


def network(weights: Weights, depths: tuple[int, ...]) -> Both:
    """`Spiking_vit_MetaFormer` as a `SpikeNetwork` of five stages with so many blocks."""
    parts: dict[str, tuple[Part, str]] = {"head": (pointwise, "head")}
    for i, (down, names) in enumerate(zip(DOWN, blocks(depths), strict=True)):
        parts[f"downsampling_{i}"] = downsampling, f"{down}."
        block = conv_block if i < len(CONV_BLOCKS) else spike_block
        parts |= {f"stage_{i}_block_{j}": (block, name) for j, name in enumerate(names)}
    return joined(weights, parts)
