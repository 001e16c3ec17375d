"""Our values for the golden cases of `zero_tprune`: a precursor by the same first author."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxformer.compress.tokens import keep_best
from jaxformer.interop import authors
from jaxformer.kernels.attention import Full
from jaxformer.nn.attention import Attention, Scores, Softmax, Unfused
from jaxformer.nn.make import Make
from jaxformer.papers.zero_tprune.model import EIR, page_rank

RMS = EIR(0.0, float("inf"))  # over all heads


def importance(case, score, iterations, alive=None, damping=0.0):
    """Of all tokens but the class token: (B, N - 1)."""
    a = jax.nn.softmax(score / case.config["tau_imp"], axis=-1)
    start = jnp.full(score.shape[::2][:1] + score.shape[-1:], 1 / score.shape[-1])
    s = page_rank(a, start, iterations, alive_BxN=alive, damping=damping)
    return RMS(s, jnp.ones(start.shape))[:, 1:]


def next_mask(importance, count):
    """1 for the `count` most important."""
    kept = keep_best(importance, count, protected=0)
    return jnp.zeros(importance.shape).at[jnp.arange(len(kept))[:, None], kept].set(1.0)


def attention(case, x, weights, alive=None):
    """The layer's output and its scores; with `alive` (B, N), the authors' masked softmax."""
    fused, out = (authors.linear(weights, name) for name in ("qkv", "proj"))
    params = authors.fused_attention(fused, out, case.config["num_heads"])
    layer = Attention(case.config["num_heads"], core=Make(Unfused))
    seen = []

    def intercept(method, args, kwargs, context):
        if isinstance(context.module, Softmax) and alive is not None:
            eps = case.config["eps"]
            e = jnp.exp(args[0]) * alive[:, None, None]
            return (e + eps / e.shape[-1]) / (e.sum(-1, keepdims=True) + eps)
        y = method(*args, **kwargs)
        if isinstance(context.module, Scores):
            seen.append(y)
        return y

    with nn.intercept_methods(intercept):
        return layer.apply({"params": params}, x, mask=Full()), seen[0]


def precursor_attention(case):
    c, inputs = case.config, case.inputs
    found = case.outputs_and_gradients(lambda w, i: attention(case, i["x"], w)[0])
    ours = importance(case, attention(case, inputs["x"], case.weights)[1], 5)
    score = inputs["score"]

    def weighed(score):
        return jnp.sum(importance(case, score, 5) * inputs["cotangent_importance"])

    return {
        **found,
        "out/importance": ours,
        "out/next_mask": next_mask(ours, int((c["N"] - 1) * c["retain_rate"])),
        **{f"out/importance_of_score_iters{n}": importance(case, score, n) for n in c["iters"]},
        "out/importance_of_score_damped": importance(case, score, 5, damping=c["damping"]),
        "out/importance_of_score_masked": importance(case, score, 5, inputs["token_mask"]),
        "grad_in/score": jax.grad(weighed)(score),
    }


def precursor_masked_training(case):
    c, mask = case.config, case.inputs["token_mask"]
    alive = jnp.pad(mask, ((0, 0), (1, 0)), constant_values=1.0)
    found = case.outputs_and_gradients(lambda w, i: attention(case, i["x"], w, alive)[0])
    score = attention(case, case.inputs["x"], case.weights, alive)[1]
    ours = importance(case, score, c["iters"], alive)
    left = int(int(mask[0].sum()) * c["retain_rate"])
    return {
        **found,
        "out/importance": ours,
        "out/next_mask": next_mask(ours, left),
        "out/main_prune_false": attention(case, case.inputs["x"], case.weights, alive)[0],
        "out/next_mask_prune_false": jnp.ones(mask.shape),
    }


PORTS = {
    "precursor_attention": precursor_attention,
    "precursor_masked_training": precursor_masked_training,
}
