"""Our values for the golden cases of `ledit`: the DiT that the paper builds on."""

from __future__ import annotations

import jax.numpy as jnp

from jaxformer.kernels.attention import Full
from jaxformer.models.dit import dit
from jaxformer.nn.activation import GELU_TANH
from jaxformer.nn.attention import Attention
from jaxformer.nn.condition import AdaLNZero, Modulation, sinusoid
from jaxformer.nn.grid import GridTable
from jaxformer.nn.make import Make
from jaxformer.nn.mlp import MLP
from jaxformer.papers.ledit import authors
from jaxformer.sampling.diffusion import DDIM, Ancestral, Point, guide
from jaxformer.tasks.gaussian_diffusion import FixedVariance, GaussianDiffusion, LearnedRange


def to_last(x):
    """Channels from the second axis to the last."""
    return jnp.moveaxis(x, 1, -1)


def to_second(x):
    return jnp.moveaxis(x, -1, 1)


def dit_block(case):
    c = case.config
    hidden = int(c["hidden_size"] * c["mlp_ratio"])
    layer = AdaLNZero(
        mixer=Make(Attention, heads=c["num_heads"]),
        mlp=Make(MLP, hidden=hidden, activation=GELU_TANH),
    )

    def main(weights, inputs):
        params = {"params": authors.block(weights, "", c["num_heads"])}
        return layer.apply(params, inputs["x"], inputs["c"], mask=Full())

    modulation = {"params": authors.modulation(case.weights, "", 6)}
    vectors = Modulation(6).apply(modulation, case.inputs["c"])
    return {
        **case.outputs_and_gradients(main),
        "out/modulation": jnp.concatenate([v[:, 0] for v in vectors], axis=-1),
    }


def dit_forward(case):
    c = case.config
    channels, side = c["in_channels"], c["input_size"] // c["patch_size"]
    sizes = {
        "width": c["hidden_size"],
        "depth": c["depth"],
        "heads": c["num_heads"],
        "patch": c["patch_size"],
    }
    model = dit(
        **sizes,
        hidden=int(c["hidden_size"] * c["mlp_ratio"]),
        channels=channels * (1 + c["learn_sigma"]),
        labels=c["num_classes"] + (c["class_dropout_prob"] > 0),
        position=Make(GridTable, trained=(side, side)),
    )

    def main(weights, inputs, table=1.0):
        params = authors.dit(
            weights, heads=sizes["heads"], depth=sizes["depth"], patch=sizes["patch"]
        )
        position = table * weights["pos_embed"].reshape(side, side, -1)
        params = {"params": {**params, "position": {"table": position}}}
        x = to_last(inputs["x"])
        return to_second(model.apply(params, x, inputs["t"], label=inputs["y"]))

    # The guided network sees the first half of the batch twice.
    half = len(case.inputs["x"]) // 2
    twice = jnp.concatenate([case.inputs["x"][:half]] * 2)
    answers = to_last(main(case.weights, {**case.inputs, "x": twice}))
    conditional, unconditional = answers[:half], answers[half:]
    guided = guide(conditional, unconditional, c["cfg_scale"], 3)
    own = jnp.concatenate([guided[..., :3], unconditional[..., 3:]], axis=-1)
    return {
        **case.outputs_and_gradients(main),
        "out/nope": main(case.weights, case.inputs, table=0.0),
        "out/cfg": to_second(jnp.concatenate([guided, own])),
        "out/t_freq": sinusoid(case.inputs["t"], case.arrays["out/t_freq"].shape[1]),
    }


def process_of(config):
    variance = LearnedRange() if config.get("learn_sigma", True) else FixedVariance()
    schedule = config.get("noise_schedule", "linear")
    return GaussianDiffusion(config["diffusion_steps"], schedule, variance)


def training_losses(case):
    c = case.config
    process = process_of(c)
    if c["timestep_respacing"]:
        process = process.respaced(c["timestep_respacing"])
    x, noise, output = (to_last(case.inputs[k]) for k in ("x_start", "noise", "model_output"))
    t = case.inputs["t"]

    def main(weights, inputs):
        return sum(process.losses(to_last(inputs["model_output"]), x, noise, t).values())

    x_t = process.mix(x, noise, t)
    reverse = process.reverse(output, x_t, t)
    found = {
        **case.outputs_and_gradients(main),
        **{f"out/{name}": value for name, value in process.losses(output, x, noise, t).items()},
        "out/x_t": to_second(x_t),
        "out/t_seen_by_model": process.network_time(t),
        "out/p_mean": to_second(reverse.mean),
        "out/p_log_variance": to_second(reverse.log_variance),
        "out/p_pred_xstart": to_second(reverse.start),
        "out/q_mean": to_second(process.posterior(x, x_t, t)),
    }
    q = process.at("log_posterior", t).reshape(-1, 1, 1, 1)
    return {**found, "out/q_log_variance": jnp.broadcast_to(q, case.inputs["x_start"].shape)}


def sampler(case):
    c = case.config
    a, noise = case.inputs["a"], jnp.moveaxis(case.inputs["noise"], 2, -1)

    def toy(x, time):
        tau = (time / c["diffusion_steps"]).reshape(-1, 1, 1, 1)
        eps = (0.8 + 0.2 * a[0]) * x + a[1] * jnp.sin(6 * tau) * jnp.roll(x, 1, axis=2)
        code = jnp.tanh(a[2] * x + a[3] * jnp.cos(6 * tau))
        return jnp.concatenate([eps, code], axis=-1)

    def chain(rule):
        plan = rule.plan(process_of(c))
        x, states, starts = to_last(case.inputs["x_T"]), [], []
        for j, k in enumerate(reversed(range(len(plan)))):
            t = jnp.full(len(x), k)
            x, start = rule.step(plan, toy(x, plan.network_time(t)), Point(x, t, noise[j]))
            states.append(to_second(x))
            starts.append(to_second(start))
        return plan, jnp.stack(states), jnp.stack(starts)

    options = {"spacing": c["timestep_respacing"] or c["diffusion_steps"]}
    options["clip"] = c["clip_denoised"]
    plan, main, starts = chain(Ancestral(**options))
    seen = plan.network_time(jnp.arange(len(plan))[::-1])
    return {
        "out/main": main,
        "out/pred_xstart": starts,
        "out/ddim": chain(DDIM(**options))[1],
        "out/timestep_map": plan.original,
        "out/betas": plan.tables["beta"],
        "out/posterior_log_variance_clipped": plan.tables["log_posterior"],
        "out/t_seen_by_model": seen,
    }


PORTS = {
    "dit_block": dit_block,
    "dit_forward": dit_forward,
    "training_losses": training_losses,
    "sampler": sampler,
}
