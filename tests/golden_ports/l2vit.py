"""Our values for the golden cases of `l2vit`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxformer.kernels.attention import Full
from jaxformer.nn.attention import Attention
from jaxformer.nn.depthwise import ConvPosition
from jaxformer.nn.make import Make
from jaxformer.nn.mlp import MLP
from jaxformer.nn.window import Windowed
from jaxformer.papers.l2vit import authors
from jaxformer.papers.l2vit.model import (
    ClampedLinearAttention,
    GlobalBlock,
    LocalConcentration,
    WindowBlock,
    l2vit,
)


def seen(module, variables, x, **how):
    """The output, and what went into or came out of modules on the way, by method or name."""
    found = {}

    def watch(call, args, kwargs, context):
        y = call(*args, **kwargs)
        if context.method_name == "normalised":
            found["raw"] = args[1][..., 0].swapaxes(1, 2)
        elif context.method_name == "__call__" and context.module.name:
            found[context.module.name] = y
        return y

    with nn.intercept_methods(watch):
        return module.apply(variables, x, **how), found


def linear_attention(case):
    layer = ClampedLinearAttention(case.config["num_heads"], clamp=case.config["clamp_min"])

    def variables(weights):
        return {"params": authors.attention(weights, "", layer.heads)}

    def main(weights, inputs):
        return layer.apply(variables(weights), inputs["x"], mask=Full())

    _, found = seen(layer, variables(case.weights), case.inputs["x"], mask=Full())
    return {**case.outputs_and_gradients(main), "out/raw_denominator": found["raw"]}


def parts(config):
    grid = tuple(config["size"])
    return grid, {
        "mlp": Make(MLP, hidden=round(config["dim"] * config["mlp_ratio"])),
        "position": Make(ConvPosition, grid=grid),
    }


def compared(case, block):
    def variables(weights):
        params, running = authors.block(weights, "", case.config["num_heads"])
        return {"params": params, "batch_stats": running}

    def main(weights, inputs):
        return block.apply(variables(weights), inputs["x"], mask=Full())

    _, found = seen(block, variables(case.weights), case.inputs["x"], mask=Full())
    return case.outputs_and_gradients(main), found


def lga_block(case):
    grid, common = parts(case.config)
    mixer = Make(ClampedLinearAttention, heads=case.config["num_heads"])
    local = Make(LocalConcentration, grid=grid) if case.config["enhanced"] else None
    compare, found = compared(case, GlobalBlock(mixer=mixer, local=local, **common))
    return {**compare, "out/raw_denominator": found["raw"], "out/lcm_out": found["local"]}


def lwa_block(case):
    grid, common = parts(case.config)
    attention = Make(Attention, heads=case.config["num_heads"])
    mixer = Make(Windowed, mixer=attention, grid=grid, window=case.config["window_size"])
    return compared(case, WindowBlock(mixer=mixer, **common))[0]


@jax.custom_vjp
def misread(x):
    """The identity, with the gradient of the file's PyTorch (2.13).

    Its BatchNorm2d in eval mode, of a batch of one, takes a gradient that lies channels last for
    one that lies channels first. The stem's last norm is followed by such a transposition, so that
    the file's gradients before it are of a gradient whose memory was read in the wrong order.
    Central differences of PyTorch's own forward pass in float64 give ours: 0.5061 for the first
    weight of the first convolution, where its backward pass says -0.0922.
    """
    return x


def _misread_back(_, gradient):
    batch, height, width, channels = gradient.shape
    if batch > 1:
        return (gradient,)
    return (gradient.reshape(1, channels, height, width).transpose(0, 2, 3, 1),)


misread.defvjp(lambda x: (x, None), _misread_back)


def after_stem(call, args, kwargs, context):
    y = call(*args, **kwargs)
    return misread(y) if context.module.path[-2:] == ("embed", "conv_2") else y


def full(case):
    c = case.config
    depths, heads = tuple(c["depths"]), tuple(c["num_heads"])
    model = l2vit(
        image_size=tuple(c["input_hw"]),
        widths=tuple(c["dims"]),
        depths=depths,
        heads=heads,
        window=c["window_size"],
        mlp_ratio=tuple(c["mlp_ratio"]),
        classes=c["num_classes"],
    )

    def variables(weights):
        params, running = authors.model(weights, depths, heads)
        return {"params": params, "batch_stats": running}

    def main(weights, inputs):
        with nn.intercept_methods(after_stem):
            return model.apply(variables(weights), inputs["x"].transpose(0, 2, 3, 1))

    x = jnp.transpose(case.inputs["x"], (0, 2, 3, 1))
    found = jax.jit(lambda weights, x: seen(model, variables(weights), x)[1])(case.weights, x)
    stages = {f"out/stage{i}": found[f"stage_{i}"] for i in range(len(depths))}
    kept = case.arrays["out/stage0"].shape[1]  # the file has the first tokens of this one alone
    stages["out/stage0"] = stages["out/stage0"][:, :kept]
    return {**case.outputs_and_gradients(main), **stages}


PORTS = {
    "linear_attention": linear_attention,
    "lga_block": lga_block,
    "lwa_block": lwa_block,
    "full": full,
}
