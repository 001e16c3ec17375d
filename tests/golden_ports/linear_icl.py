"""Our values for the golden cases of `linear_icl`."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxformer.models.transformer import Transformer
from jaxformer.papers.linear_icl import authors, model
from jaxformer.papers.linear_icl.transformer import in_context_transformer, interleave


def closed_form(case):
    x = {
        key.removeprefix("in/"): jnp.asarray(value)
        for key, value in case.arrays.items()
        if key.startswith("in/")
    }
    N, M, u = case.config["N_train"], case.config["M_test"], jnp.asarray(case.config["u"])
    Lambda = x["Lambda"]
    limit = model.limit(Lambda, N)
    given = {"W_KQ": x["random_WKQ"], "W_PV": x["random_WPV"]}
    E = model.embedding(x["x"], x["y"], x["xq"])
    dU, du = model.reduced_flow(x["U"], u, Lambda, N)
    return {
        "out/Gamma": model.gamma(Lambda, N),
        "out/WKQ": limit["W_KQ"],
        "out/WPV": limit["W_PV"],
        "out/main": model.predict(limit, x["x"], x["y"], x["xq"]),
        "out/full_output": model.layer(limit, E),
        "out/random_yhat": model.predict(given, x["x"], x["y"], x["xq"]),
        "out/random_full_output": model.layer(given, E),
        "out/reduced_loss": model.reduced_loss(x["U"], u, Lambda, N),
        "out/reduced_dU": dU,
        "out/reduced_du": du,
        "out/L_min": model.minimum_loss(Lambda, N),
        "out/risk": model.mean_risk(Lambda, N, M),
        "out/random_cov_B": jnp.diagonal(
            model.random_covariance_limit(jax.vmap(jnp.diag)(x["lambdas"]), N)
        ),
    }


def garg_transformer(case):
    c = case.config
    heads, layers = c["n_head"], c["n_layer"]
    trunk = Transformer(width=c["n_embd"], depth=layers, heads=heads, mlp="gelu_tanh")
    module = in_context_transformer(trunk, c["n_positions"])

    def main(weights, inputs):
        params = authors.transformer(weights, heads, layers)
        return module.apply({"params": params}, inputs["xs"], inputs["ys"])

    found = case.outputs_and_gradients(main)
    x, y = case.inputs["xs"], case.inputs["ys"]
    error = found["out/main"] - y
    return {**found, "out/combined": interleave(x, y), "out/loss_mse": (error**2).mean()}


PORTS = {"closed_form": closed_form, "garg_transformer": garg_transformer}
