"""Our values for the golden cases of `icrl`."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxformer.decision import controllers as c
from jaxformer.kernels.attention import Causal
from jaxformer.nn.position import LearnedPosition
from jaxformer.papers.icrl import authors
from jaxformer.papers.icrl.model import (
    bandit_transformer,
    logged,
    optimal,
    relu_trunk,
    softmax_trunk,
)
from jaxformer.tasks.losses import cross_entropy


def relu_backbone(case):
    config, layers = case.config, case.config["n_layer"]
    trunk, mixer = relu_trunk(config["n_embd"], layers)
    stack = trunk.stack(mixer)

    def hidden(weights, inputs, count=layers):
        table = {"table": weights["wpe.weight"]}
        x = LearnedPosition(config["n_positions"]).apply({"params": table}, inputs["inputs_embeds"])
        params = authors.relu_blocks(weights, "", layers)
        first = stack.replace(blocks=dict(stack.arguments)["blocks"][:count])
        return first().apply({"params": params}, x, mask=Causal())

    each = {
        f"out/hidden_states_{i}": hidden(case.weights, case.inputs, i) for i in range(layers + 1)
    }
    return {**case.outputs_and_gradients(hidden), **each}


def transformer(case):
    config, kind = case.config, case.config["act_type"]
    sizes = (config["n_embd"], config["n_layer"])
    heads = config["n_head"]
    trunk, mixer = relu_trunk(*sizes) if kind == "relu" else softmax_trunk(*sizes, heads)
    module = bandit_transformer(trunk, mixer, config["n_positions"])

    def logits(weights, arms, actions, rewards):
        params = authors.transformer(weights, kind, config["n_layer"], heads)
        return module.apply({"params": params}, arms, actions, rewards)

    def main(weights, inputs):
        actions = inputs["context_actions"].argmax(-1)
        return logits(weights, inputs["action_set"], actions, inputs["context_rewards"][..., 0])

    found = case.outputs_and_gradients(main)
    given = case.inputs
    batch = {
        "actions": given["context_actions"].argmax(-1),
        "best": given["optimal_action"].argmax(-1),
    }

    def after(steps):
        """The logits with that many steps past: what follows is not there yet, but padded."""
        past = jnp.arange(config["T"]) < steps
        actions = jnp.where(past, batch["actions"][:1], 0)
        rewards = jnp.where(past, given["context_rewards"][:1, :, 0], 0.0)
        return logits(case.weights, given["action_set"][:1], actions, rewards)[0, steps]

    losses = {
        "out/loss_ad_sum": cross_entropy(found["out/main"], logged(batch)).sum(),
        "out/loss_dpt_sum": cross_entropy(found["out/main"], optimal(batch)).sum(),
    }
    tests = jnp.stack([after(h) for h in range(len(case.arrays["out/test_mode_logits_row0"]))])
    return {**found, **losses, "out/test_mode_logits_row0": tests}


def controllers(case):
    config, given = case.config, case.inputs
    arms, key = given["action_set"], jax.random.key(0)
    steps = (given["actions"], given["rewards"])
    bonus = 2 * config["linucb_const"]
    ucb, greedy = c.LinUCB(bonus), c.LinUCB(0.0)
    thompson = c.LinearThompson(config["std"], config["prior_std"])
    means, online = c.EmpiricalMean(explore=False), c.EmpiricalMean()
    means_, covariances = jax.vmap(thompson.posterior)(memories(thompson, arms, *steps))
    ones = jnp.eye(config["act_num"])
    bernoulli = (ones, given["bern_actions"], given["bern_rewards"])
    beta = c.BernoulliThompson()
    alpha, failures = jax.vmap(beta.posterior)(memories(beta, *bernoulli))

    def acts(controller):
        remembered = memories(controller, arms, *steps)
        return jax.vmap(controller.act, (0, None, None))(remembered, arms, key)

    return {
        "out/main": means_,
        "out/linucb_action": acts(ucb),
        "out/linucb_greedy_action": acts(greedy),
        "out/ts_mean": means_,
        "out/ts_cov": covariances,
        "out/emp_mean_action": acts(means),
        "out/emp_mean_online_action": acts(online),
        "out/bern_linucb_value": jax.vmap(c.BernoulliUCB().values)(
            memories(c.BernoulliUCB(), *bernoulli)
        ),
        "out/bern_successes": alpha - 1,
        "out/bern_failures": failures - 1,
    }


def memories(controller, arms, actions, rewards):
    """What a controller knows after each step of a history, stacked."""

    def step(memory, seen):
        memory = controller.learn(memory, arms, *seen, arms)
        return memory, memory

    return jax.lax.scan(step, controller.start(arms), (actions, rewards))[1]


PORTS = {
    "relu_backbone": relu_backbone,
    "transformer": transformer,
    "controllers": controllers,
}
