"""Our values for the golden cases of `adalog`."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxformer.compress import adaround
from jaxformer.compress.quantizers import Log, Shifted, Symmetric, TwinUniform, Uniform
from jaxformer.compress.straight_through import round_ste
from jaxformer.papers.adalog.model import AdaLog, SmoothAdaLog, folded_bias


def adalog(case):
    c, x = case.config, case.inputs["x"]
    main = c["main"]
    found = {}
    for i, bits in enumerate(c["bits"]):
        quantizer = AdaLog(bits)
        found[f"out/adalog_bits{i}"] = jnp.stack(
            [jnp.stack([quantizer(x, s, q) for q in c["q"]]) for s in c["scales"]]
        )
        codes = jnp.arange(2.0**bits)
        tables = [quantizer.table(codes, q) for q in c["q"]]
        found[f"out/table1_bits{i}"] = jnp.stack([shift for shift, _ in tables])
        found[f"out/table2_bits{i}"] = jnp.stack([mantissa for _, mantissa in tables])
        for name, steps in (("log2", 1), ("logsqrt2", 2)):
            found[f"out/{name}_bits{i}"] = Log(bits, steps)(x, c["scales"][1])
    smooth = SmoothAdaLog(main["n_bits"])

    def scalar(x, scale):
        y = smooth(x, scale, main["q"])
        return jnp.sum(y * case.inputs["cotangent"]), y

    start = x, jnp.array([main["scale"]])
    (by_x, by_scale), y = jax.grad(scalar, argnums=(0, 1), has_aux=True)(*start)
    return found | {"out/main": y, "grad_in/x": by_x, "grad_in/scale": by_scale}


def shift(case):
    c, inputs = case.config, case.inputs
    x, scale, bits, q = inputs["x"], inputs["scale"], c["n_bits"], c["q"]
    before, kernel = Shifted(AdaLog(bits), c["shift"])(x, scale=scale, q=q), inputs["w_fc2"].T
    after = AdaLog(bits)(x + c["shift"], scale, q)
    bias = folded_bias(inputs["b_fc2"], kernel, c["shift"])

    def scalar(x, scale, shift):
        y = SmoothAdaLog(bits)(x + shift, scale, q)
        return jnp.sum(y * inputs["cotangent"]), y

    start = x, scale, jnp.array([c["shift"]])
    gradients, y = jax.grad(scalar, argnums=(0, 1, 2), has_aux=True)(*start)
    names = ("grad_in/x", "grad_in/scale", "grad_in/shift")
    uniform = {"scale": inputs["uniform_scale"], "zero": inputs["uniform_zero_point"]}
    return {
        "out/adalog_inference": before,
        "out/adalog_inference_bias_reparamed": after,
        "out/main": y,
        "out/shift_log2": Shifted(Log(bits), c["shift"])(x, scale=scale),
        "out/shift_logsqrt2": Shifted(Log(bits, 2), c["shift"])(x, scale=scale),
        "out/shift_uniform": Shifted(Uniform(bits), c["shift"])(x, **uniform),
        "out/fc2_before_fold": before @ kernel + inputs["b_fc2"],
        "out/fc2_after_fold": after @ kernel + bias,
        "out/folded_bias": bias,
        **dict(zip(names, gradients, strict=True)),
    }


def uniform_adaround(case):
    bits, inputs = case.config["n_bits"], case.inputs
    x, scale, zero, cotangent = (inputs[k] for k in ("x", "scale", "zero_point", "cotangent"))
    uniform, rounding = Uniform(bits), adaround.AdaRound(bits)

    def asymmetric(x, scale, zero):
        y = uniform(x, scale, round_ste(zero))
        return jnp.sum(y * cotangent), y

    def soft(alpha, scale, zero):
        y = rounding(x, scale, zero, alpha)
        return jnp.sum(y * cotangent), y

    every = {"argnums": (0, 1, 2), "has_aux": True}
    first, main = jax.grad(asymmetric, **every)(x, scale, inputs["zero_point_float"])
    second, softly = jax.grad(soft, **every)(inputs["alpha2"], scale, zero)
    names = ("x", "scale", "zero_point_float", "alpha2", "adaround_scale", "adaround_zero_point")
    alpha, twin = adaround.start(x, scale), inputs["twin_scale"]
    return {
        "out/asym": uniform(x, scale, zero),
        "out/sym": Symmetric(bits)(x, scale),
        "out/main": main,
        "out/twin": TwinUniform(bits)(x, twin[0], twin[1]),
        "out/adaround_alpha": alpha,
        "out/adaround_soft_targets_init": adaround.up(alpha),
        "out/adaround_soft": softly,
        "out/adaround_hard": rounding.hard(x, scale, zero, inputs["alpha2"]),
        "out/adaround_hard_value": rounding.unclipped(x, scale, inputs["alpha2"]),
        **{f"grad_in/{n}": g for n, g in zip(names, (*first, *second), strict=True)},
    }


PORTS = {"adalog": adalog, "shift": shift, "uniform_adaround": uniform_adaround}
