"""The authors' parameter names as ours."""

from __future__ import annotations

from ml_collections import ConfigDict

from jaxformer.interop.authors import (
    Tree,
    Weights,
    fused_attention,
    linear,
    norm,
)

BATCH_STATS = ("mean", "var")


def read(config: ConfigDict, weights: Weights) -> Tree:
    """The parameters of `L2ViT` as the model of a config."""
    for name in weights:
        if name.endswith(".num_batches_tracked"):
            weights[name]  # known, and of no use: the running statistics are means already
    return model(weights, config.model.depths, config.model.heads)[0]


def read_extra(config: ConfigDict, weights: Weights) -> Tree:
    """Its running statistics."""
    return {"batch_stats": model(weights, config.model.depths, config.model.heads)[1]}


def depthwise(weights: Weights, name: str) -> Tree:
    """A depth-wise Conv2d, (C, 1, size, size)."""
    kernel = weights[f"{name}.weight"][:, 0].transpose(1, 2, 0)
    return {"kernel": kernel, "bias": weights[f"{name}.bias"]}


def conv(weights: Weights, name: str) -> Tree:
    """A Conv2d, (out, in, size, size)."""
    kernel = weights[f"{name}.weight"].transpose(2, 3, 1, 0)
    return {"kernel": kernel, "bias": weights[f"{name}.bias"]}


def statistics(weights: Weights, name: str) -> Tree:
    """The running statistics of a BatchNorm2d."""
    return {part: weights[f"{name}.running_{part}"] for part in BATCH_STATS}


def attention(weights: Weights, prefix: str, heads: int) -> Tree:
    """The attention of either block; with a temperature it is the linear one."""
    qkv, proj = (linear(weights, f"{prefix}{name}") for name in ("qkv", "proj"))
    found = fused_attention(qkv, proj, heads)
    if f"{prefix}temperature" in weights:
        found["temperature"] = weights[f"{prefix}temperature"][:, 0, 0]
    return found


def block(weights: Weights, prefix: str, heads: int) -> tuple[Tree, Tree]:
    """`LWABlock` or `LGABlock`: parameters and batch statistics; `prefix` ends with a dot."""
    mixer = attention(weights, f"{prefix}attn.", heads)
    found: Tree = {
        "mixer_residual": {"norm": norm(weights, f"{prefix}norm1")},
        "mlp_residual": {"norm": norm(weights, f"{prefix}norm2")},
        "mlp": {
            "up": linear(weights, f"{prefix}mlp.fc1"),
            "down": linear(weights, f"{prefix}mlp.fc2"),
        },
    }
    first = {"conv": depthwise(weights, f"{prefix}cpe.0.proj")}
    if f"{prefix}cpe.1.proj.weight" in weights:
        second = {"conv": depthwise(weights, f"{prefix}cpe.1.proj")}
        return {**found, "mixer": {"mixer": mixer}, "position_1": first, "position_2": second}, {}
    found |= {"mixer": mixer, "position": first}
    if f"{prefix}local_mp.conv1.weight" not in weights:
        return found, {}
    found["local"] = {
        "conv_1": depthwise(weights, f"{prefix}local_mp.conv1"),
        "norm": norm(weights, f"{prefix}local_mp.bn"),
        "conv_2": depthwise(weights, f"{prefix}local_mp.conv2"),
    }
    found["local_residual"] = {"norm": norm(weights, f"{prefix}norm3")}
    return found, {"local": {"norm": statistics(weights, f"{prefix}local_mp.bn")}}


def model(weights: Weights, depths: tuple[int, ...], heads: tuple[int, ...]) -> tuple[Tree, Tree]:
    """`L2ViT` as that of `model.l2vit`: parameters and batch statistics."""
    stem = "downsample_layers.0."
    embed: Tree = {}
    running: Tree = {"embed": {}}
    for name, at, normed in (("conv_1", 0, 1), ("conv_2", 3, 4)):
        batch_norm = f"{stem}proj.proj.{normed}"
        embed[name] = {
            **conv(weights, f"{stem}proj.proj.{at}"),
            "norm": norm(weights, batch_norm),
        }
        running["embed"][name] = {"norm": statistics(weights, batch_norm)}
    encoder: Tree = {
        "embed": embed,
        "embed_norm": norm(weights, f"{stem}norm"),
        "norm": norm(weights, "norm"),
    }
    for stage, depth in enumerate(depths):
        if stage:
            down = f"downsample_layers.{stage}."
            reduction = {"projection": conv(weights, f"{down}proj")}
            encoder[f"merge_{stage}"] = {
                "norm": norm(weights, f"{down}norm"),
                "reduction": reduction,
            }
        blocks = [block(weights, f"stages.{stage}.{i}.", heads[stage]) for i in range(depth)]
        encoder[f"stage_{stage}"] = {f"block_{i}": b[0] for i, b in enumerate(blocks)}
        running[f"stage_{stage}"] = {f"block_{i}": b[1] for i, b in enumerate(blocks) if b[1]}
    head = linear(weights, "head")
    return {"encoder": encoder, "head": head}, {"encoder": running}
