"""Our values for the golden cases of `bivit`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxformer.compress.binary import BinaryEinsum, BinaryOperands
from jaxformer.compress.intercepted import Intercepted
from jaxformer.kernels.attention import Full
from jaxformer.nn.attention import Attention, Mix, Scores, Softmax, Unfused
from jaxformer.nn.einsum import Einsum
from jaxformer.nn.make import Make
from jaxformer.nn.mlp import MLP
from jaxformer.papers.bivit import authors
from jaxformer.papers.bivit.model import BinaryRows, PositiveScores, SoftmaxAware


def seen(intercepted, *args, **kwargs):
    """The output, and what went into or came out of modules on the way."""
    found = {}

    def outside(call, args, kwargs, context):
        y, part = call(*args, **kwargs), context.module
        if context.method_name == "contract" and part.name:
            found[f"{part.name}/x"], found[f"{part.name}/y"] = args[0], y
        if isinstance(part, Softmax | Scores) and context.method_name == "__call__":
            found[part.name] = y
        if isinstance(part, Mix) and context.method_name == "__call__":
            found["mask"] = args[0]
        return y

    def inside(call, args, kwargs, context):
        y = call(*args, **kwargs)
        if isinstance(context.module, Softmax) and context.method_name == "__call__":
            found["a"] = y
        return y

    with nn.intercept_methods(outside), intercepted.active(), nn.intercept_methods(inside):
        return intercepted.model.apply(*args, **kwargs), found


def joined(x):
    """Heads (B, L, H, K) side by side."""
    return x.reshape(*x.shape[:-2], -1)


def attention(case, rows, whole=True):
    heads = case.config["num_heads"]
    layer = Attention(heads, use_bias=case.config["qkv_bias"], core=Make(Unfused))
    maps = BinaryEinsum(r"^(query|key|value|out)$", learned="qkv.scaling_factor" in case.weights)
    model = Intercepted(layer, (maps, BinaryOperands(""), BinaryRows(rows, "")))

    def run(weights, x):
        if not whole:  # the file has no projection: any will do
            width = x.shape[-1]
            weights = {**weights, "proj.weight": jnp.zeros((width, width))}
            weights |= {f"proj.{n}": jnp.zeros(s) for n, s in (("bias", width),)}
            weights["proj.scaling_factor"] = jnp.zeros((width, 1))
        params = authors.attention(weights, "", heads)
        y, found = seen(model, {"params": params}, x, mask=Full())
        return y if whole else joined(found["out/x"]), found

    found = jax.jit(run)(case.weights, case.inputs["x"])[1]
    parts = [joined(found[f"{name}/y"]) for name in ("query", "key", "value")]
    values = {
        "out/qkv": jnp.concatenate(parts, -1),
        "out/attn_scores": found["scores"],
        "out/softmax": found["a"],
        "out/attn_mask": found["mask"],
        "out/heads_out": joined(found["out/x"]),
    }
    values = {name: x for name, x in values.items() if name in case.arrays}
    return {**case.outputs_and_gradients(lambda w, i: run(w, i["x"])[0]), **values}


def mlp(case, binary_inputs, learned):
    layer = MLP(case.config["hidden_features"])
    model = Intercepted(layer, (BinaryEinsum("", binary_inputs, learned),))

    def run(weights, x):
        return seen(model, {"params": authors.mlp(weights, "")}, x)

    found = run(case.weights, case.inputs["x"])[1]
    return {
        **case.outputs_and_gradients(lambda w, i: run(w, i["x"])[0]),
        "out/fc1": found["up/y"],
        "out/fc2_input": found["down/x"],
    }


def first_run_scale(case):
    layer = Einsum("...D,DF->...F", (case.config["out_features"],))
    model = Intercepted(layer, (BinaryEinsum(""),))

    def completed(weights, x):
        params = authors.linear({f"l.{name}": w for name, w in weights.items()}, "l")
        return model.complete(jax.random.key(0), params, {}, x)[0]

    scale = completed(case.weights, case.inputs["x"])["scale"][:, None]

    def main(weights, inputs):
        named = {f"l.{name}": w for name, w in weights.items()}
        return model.apply({"params": authors.binary_linear(named, "l")}, inputs["x"])

    class Filled(type(case)):
        """The case with the scale among its weights, whose gradient the file has."""

        @property
        def weights(self):
            return {**super().weights, "scaling_factor": scale}

    return {**Filled(case.path).outputs_and_gradients(main), "out/scaling_factor_after": scale}


PORTS = {
    "sab": lambda case: attention(case, SoftmaxAware()),
    "sab_heads": lambda case: attention(case, SoftmaxAware(), whole=False),
    "baseline": lambda case: attention(case, PositiveScores()),
    "mlp_binary": lambda case: mlp(case, binary_inputs=True, learned=False),
    "mlp_float_input": lambda case: mlp(case, binary_inputs=False, learned=True),
    "first_run_scale": first_run_scale,
}
