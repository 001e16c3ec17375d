"""Our values for the golden cases of `key_driven_gqa`."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from jaxformer.kernels.attention import Full
from jaxformer.nn.attention import Attention, Fused
from jaxformer.nn.make import Make
from jaxformer.nn.surgery import pool_key_heads
from jaxformer.papers.key_driven_gqa import authors
from jaxformer.papers.key_driven_gqa.model import (
    RULES,
    STATE,
    Allocated,
    BatchSplit,
    WindowSplit,
    key_norms,
    perturb,
)


def layer_of(case, core):
    c = case.config
    return Attention(c["num_heads"], c["num_kv_heads"], use_bias=c["qkv_bias"], core=core)


def params_of(case, weights):
    return authors.grouped(weights, "", case.config["num_heads"], case.config["num_kv_heads"])


def output(case, core=Make(Fused)):
    """(weights, inputs) -> the output of a layer without state."""
    layer = layer_of(case, core)

    def main(weights, inputs):
        return layer.apply({"params": params_of(case, weights)}, inputs["x"], mask=Full())

    return main


def keys(case, x):
    layer = params_of(case, case.weights)["key"]
    return jnp.einsum("BSD,DGK->BSGK", x, layer["kernel"]) + layer["bias"]


def gqa_conversion(case):
    heads, kv_heads = case.config["num_heads"], case.config["num_kv_heads"]
    theirs = {n.removeprefix("mha/"): x for n, x in case.inputs.items() if n.startswith("mha/")}
    before = authors.multi_head(theirs, "blocks.0.attn.", heads)
    after = authors.names_of(pool_key_heads(before, kv_heads))
    return {
        **case.outputs_and_gradients(output(case)),
        **{f"out/converted/{name}": x for name, x in after.items()},
    }


def kdgqa(case):
    k = keys(case, case.inputs["x"])
    return {
        **case.outputs_and_gradients(output(case, Make(Allocated, split=Make(BatchSplit)))),
        "out/key_norms": key_norms(k),
        "out/split": BatchSplit().apply({}, k, case.config["num_heads"]),
    }


class Drawn(WindowSplit):
    """Repairs with the heads that the authors drew."""

    draws: tuple[int, ...] = ()

    def pick(self, key, i, kv_heads):
        return jnp.asarray((*self.draws, 0), jnp.int32)[i]


def dgqa(case):
    c, x = case.config, case.inputs["x"]
    steps = [*case.inputs["steps"].tolist(), 0]
    counts = case.inputs["repair_draw_count"].tolist()
    ends = np.cumsum(counts)
    params = params_of(case, case.weights)
    state = {"split": jnp.full(c["num_kv_heads"], c["num_heads"] // c["num_kv_heads"], jnp.int32)}
    state |= {"cache": case.inputs["cache0"], "seed": jnp.zeros((), jnp.uint32)}
    found = {"out/main": [], "out/split": [], "out/cache_after": [], "out/key_norms": []}
    for j, (step, count, end) in enumerate(zip(steps, counts, ends, strict=True)):
        draws = tuple(case.inputs["repair_draws"][end - count : end].tolist())
        train = j < len(steps) - 1
        split = Make(
            Drawn, rule=RULES[c["kind"]], window=c["window_size"], by_batch=True, draws=draws
        )
        layer = layer_of(case, Make(Allocated, split=split))
        state["count"] = jnp.asarray(step, jnp.int32)
        variables = {"params": params, STATE: {"core": {"split": state}}}
        k = keys(case, x[j])
        u = key_norms(k)
        if train:
            out, changed = layer.apply(variables, x[j], mask=Full(), mutable=[STATE])
            state = dict(changed[STATE]["core"]["split"])
        else:  # theirs also writes here; ours reads the batch, and the cache would be its norms
            out = layer.apply(variables, x[j], mask=Full())
            inner = split()
            n = inner.apply({STATE: state}, k, c["num_heads"])
            state = {**state, "split": n, "cache": u}
        for name, value in zip(found, (out, state["split"], state["cache"], u), strict=True):
            found[name].append(value)
    return {name: jnp.stack(values) for name, values in found.items()}


def pgqa(case):
    c = case.config
    layer = layer_of(case, Make(Fused))

    class Given(Fused):
        """The core with the authors' draw in place of ours."""

        def __call__(self, q, k, v, **options):
            return perturb(Fused.__call__(self, q, k, v, **options), case.inputs["uniform"])

    assert layer.kv_heads == c["num_kv_heads"]
    return case.outputs_and_gradients(output(case, Make(Given)))


PORTS = {
    "gqa_conversion": gqa_conversion,
    "kdgqa": kdgqa,
    "dgqa": dgqa,
    "pgqa": pgqa,
}
