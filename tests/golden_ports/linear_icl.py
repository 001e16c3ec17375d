"""Our values for the golden cases of `linear_icl`."""

from __future__ import annotations

import jax.numpy as jnp

from jaxformer.papers.linear_icl import model


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
        "out/random_cov_B": model.random_covariance_limit(x["lambdas"], N),
    }


PORTS = {"closed_form": closed_form}
