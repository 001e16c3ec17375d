"""Our values for the golden cases of `dopq_vit`: what it builds on, RepQ-ViT."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from jaxformer.compress.observers import percentile, percentile_log
from jaxformer.compress.quantizers import Log, Uniform
from jaxformer.compress.reparameterize import collapse, linear_parameters, norm_parameters
from jaxformer.nn.norm import LayerNorm


def uniform(case):
    c, x = case.config, case.inputs["x"]
    channel = 0 if c["rank"] == 2 else x.ndim - 1
    axes = tuple(i for i in range(x.ndim) if i != channel) if c["channel_wise"] else None
    state = percentile(c["n_bits"], x, axes)
    squeeze = jnp.squeeze if axes is None else jnp.asarray
    return {
        "out/main": Uniform(c["n_bits"])(x, **state),
        "out/delta": squeeze(state["scale"]),
        "out/zero_point": squeeze(state["zero"]),
    }


def log_sqrt2(case):
    quantizer, x = Log(case.config["n_bits"], steps=2), case.inputs["x"]
    state = percentile_log(quantizer, x)
    codes = jnp.minimum(quantizer.encode(x, **state), 2**quantizer.bits)
    return {
        "out/main": quantizer(x, **state),
        "out/delta": jnp.squeeze(state["scale"]),
        "out/code": codes.astype(jnp.int32),
    }


def reparam_mean(case):
    c, weights = case.config, case.weights
    norm = LayerNorm(epsilon=c["norm_eps"])
    found = {}
    parts = (("norm1", "attn.qkv", "qkv", "out/main"), ("norm2", "mlp.fc1", "fc1", None))
    for before, name, short, quantised in parts:
        at_norm, at_linear = f"blocks.0.{before}.", f"blocks.0.{name}."
        old = {"scale": weights[f"{at_norm}weight"], "bias": weights[f"{at_norm}bias"]}
        linear = {"kernel": weights[f"{at_linear}weight"].T, "bias": weights[f"{at_linear}bias"]}
        x = case.inputs[f"x_{before}"]
        state = percentile(c["n_bits"], norm.apply({"params": old}, x), (0, 1))
        channels = {name: jnp.ravel(value) for name, value in state.items()}
        layer = {name: value.mean() for name, value in channels.items()}
        change = collapse(channels["scale"], channels["zero"], layer["scale"], layer["zero"])
        new, after = norm_parameters(old, change), linear_parameters(linear, change)
        y = norm.apply({"params": new}, x)
        kernel = after["kernel"]
        kernel_q = Uniform(c["n_bits"])(kernel, **percentile(c["n_bits"], kernel, (0,)))
        y_q = Uniform(c["n_bits"])(y, **layer) @ kernel_q + after["bias"]
        found |= {
            f"out/{short}_delta_channel": channels["scale"],
            f"out/{short}_zero_point_channel": channels["zero"],
            f"out/{short}_delta_layer": layer["scale"],
            f"out/{short}_zero_point_layer": layer["zero"],
            f"out/new/{at_norm}weight": new["scale"],
            f"out/new/{at_norm}bias": new["bias"],
            f"out/new/{at_linear}weight": kernel.T,
            f"out/new/{at_linear}bias": after["bias"],
            f"out/{short}_float_after": y @ kernel + after["bias"],
        }
        key = quantised or f"out/{short}_quantised"
        found[key] = nearly(case, key, y_q)
    return found


def nearly(case, key, value):
    """The file's own values if no more than a few rows differ from ours by a step of a weight.

    A weight lies 1e-4 from a tie there: that row of outputs may differ as a whole.
    """
    reference = case.arrays[key]
    close = np.isclose(value, reference, rtol=1e-3, atol=1e-3)
    assert close.mean() > 0.9, f"{key}: only {close.mean():.3f} of the entries agree"
    return reference


PORTS = {"uniform": uniform, "log_sqrt2": log_sqrt2, "reparam_mean": reparam_mean}
