"""Our values for the golden cases of `graph_search`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxformer.analyze import patching
from jaxformer.papers.graph_search import authors
from jaxformer.papers.graph_search.model import searcher
from jaxformer.papers.graph_search.optim import sophia_g
from jaxformer.train.optim import signum


def model(case):
    """Padded positions are 0 in the file, whatever they are in the model."""
    c = case.config
    fields = authors.model_fields(c)
    net = searcher(**fields)
    assert net.pad == c["pad_idx"]
    valid = (case.inputs["x"] != c["pad_idx"])[..., None]

    def params_of(weights):
        return authors.searcher(weights, c["layers"], c["heads"], fields["ablate"])

    def main(weights, inputs):
        return jnp.where(valid, net.apply({"params": params_of(weights)}, inputs["x"]), 0)

    variables = {"params": params_of(case.weights)}
    found = case.outputs_and_gradients(main)
    last = net.apply(variables, case.inputs["x"])[:, -1]
    found["out/log_softmax_last"] = jax.nn.log_softmax(last)
    for i, state in enumerate(patching.states(net, variables, case.inputs["x"])[1:]):
        found[f"out/layer_output_{i}"] = jnp.where(valid, state, 0)
    return found


def sophia(case):
    c, inputs = case.config, case.inputs
    count = sum(name.startswith("p") for name in inputs)
    rate, decay = c["lr"], c["weight_decay"]
    plain = signum(c["betas"][0])(rate, decay)
    full = {"betas": c["betas"], "rho": c["rho"], "weight_decay": decay}
    whole = sophia_g(rate, batch_size=c["bs_with_hessian"], **full)
    found = {}

    def run(transform, note):
        params = {f"p{i}": inputs[f"p{i}"] for i in range(count)}
        state = transform.init(params)
        for t in range(c["steps"]):
            grads = {f"p{i}": inputs[f"grad{t}_{i}"] for i in range(count)}
            updates, state = transform.update(grads, state, params)
            params = optax.apply_updates(params, updates)
            note(t + 1, params, state)

    def note_plain(t, params, state):
        for i in range(count):
            found[f"out/p{i}_after_{t}"] = params[f"p{i}"]
            found[f"out/exp_avg{i}_after_{t}"] = state[0].mu[f"p{i}"]

    def note_whole(t, params, state):
        if t == c["steps"]:
            for i in range(count):
                found[f"out/with_hessian_p{i}_after_{t}"] = params[f"p{i}"]
                found[f"out/hessian{i}_after_{t}"] = state.hessian[f"p{i}"]

    run(plain, note_plain)
    run(whole, note_whole)
    found["out/main"] = found[f"out/p0_after_{c['steps']}"]

    def check_same(t, params, state):
        for i in range(count):
            np.testing.assert_allclose(params[f"p{i}"], found[f"out/p{i}_after_{t}"], atol=1e-7)

    run(sophia_g(rate, **full), check_same)
    return found


PORTS = {"model": model, "ablated": model, "sophiag": sophia}
