"""Our values for the golden cases of `noisyquant`."""

from __future__ import annotations

import jax.numpy as jnp

from jaxformer.compress.observers import symmetric_max
from jaxformer.compress.quantizers import Symmetric
from jaxformer.papers.noisyquant.model import (
    SHIFTS,
    Noisy,
    amplitude_search,
    clip_search,
    folded_bias,
    shift_search,
)


def rows(x):
    return x.reshape(-1, x.shape[-1])


def quantisers(case):
    weigher = Symmetric(case.config["bit_weight"])
    quantizer = Symmetric(case.config["bit_activation"])
    weight, x, scale = case.weights["weight"], case.inputs["x"], case.inputs["act_scale"]
    state = symmetric_max(weigher.bits, weight, (1,))
    return {
        "out/main": quantizer(x, scale),
        "out/weight_q": weigher(weight, **state),
        "out/weight_int": weigher.encode(weight, **state).astype(jnp.int32),
        "out/act_int": quantizer.encode(x, scale).astype(jnp.int32),
    }


def clips(case):
    quantizer = Symmetric(case.config["bit"])
    x, kernel = case.inputs["x"], case.weights["weight"].T
    found = clip_search(rows(x), kernel, quantizer, case.config["search_space"])
    return {
        "out/main": quantizer(x, found.value) @ kernel + case.weights["bias"],
        "out/act_scale": found.value,
        "out/best_index": found.index.astype(jnp.int32),
        "out/losses": found.losses,
    }


def noisy(case):
    c, inputs = case.config, case.inputs
    quantizer = Symmetric(c["bit"])
    weight, bias = case.weights["fc.weight"], case.weights["fc.bias"]
    weight_q = quantizer(weight, **symmetric_max(c["bit"], weight, (1,)))
    x, x2, kernel = inputs["x"], inputs["x2"], weight_q.T
    scale = clip_search(rows(x), kernel, quantizer).value
    found = {
        "out/act_scale": scale,
        "out/weight_q": weight_q,
        "out/calib_clip": quantizer(x, scale) @ kernel + bias,
    }
    state, shift = {"scale": scale}, jnp.zeros(())
    if c["search_mean"]:
        best = shift_search(rows(x), kernel, quantizer, state)
        shift, found["out/best_mean_index"] = best.value, (best.index - SHIFTS).astype(jnp.int32)
    noise = jnp.broadcast_to(shift, kernel.shape[:1])
    found["out/noisy_bias"] = shift
    if c["search_noisy"]:
        # The authors' code draws from a normal distribution, doubles and subtracts 1.
        draw = 2 * inputs["normal_draw"].ravel() - 1
        best = amplitude_search(rows(x), kernel, quantizer, state, shift, draw)
        noise, found["out/best_range_index"] = best.value, best.index.astype(jnp.int32)
        found["out/noisy_bias"] = noise[None, None]
    layer = Noisy(quantizer)
    folded = quantizer(x2 + noise, scale) @ kernel + folded_bias(bias, kernel, noise)
    assert jnp.allclose(folded, layer(x2, noise, scale=scale) @ kernel + bias, atol=1e-4)
    return found | {
        "out/calib_noise": layer(x, noise, scale=scale) @ kernel + bias,
        "out/main": folded,
    }


PORTS = {
    "quantisers": quantisers,
    "clip_search": clips,
    "mean_noise": noisy,
    "mean_only": noisy,
    "noise_only": noisy,
}
