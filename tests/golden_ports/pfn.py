"""Our values for the golden cases of `pfn`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.scipy.stats import norm

from jaxformer.models.transformer import Transformer
from jaxformer.nn.bar_distribution import BarDistribution, FullSupportBarDistribution
from jaxformer.papers.pfn import authors
from jaxformer.papers.pfn.model import set_transformer


def nll_and_gradients(bars, logits, y, cotangent):
    """The NLL and the gradients of sum(NLL * cotangent) by logits and targets."""

    def scalar(logits, y):
        loss = bars.nll(logits, y)
        return jnp.sum(loss * cotangent), loss

    gradients, loss = jax.grad(scalar, argnums=(0, 1), has_aux=True)(logits, y)
    return loss, *gradients


def bars_of(case):
    x = case.inputs
    bars, full = BarDistribution(x["borders"]), FullSupportBarDistribution(x["borders"])
    loss, by_logits, _ = nll_and_gradients(bars, x["logits"], x["y"], x["cotangent"])
    found = {"out/main": loss, "grad_in/logits": by_logits}
    losses = nll_and_gradients(full, x["logits"], x["y_full"], x["cotangent"])
    found |= zip(("out/main_full", "grad_in/logits_full", "grad_in/y_full"), losses, strict=True)
    found["out/mean"], found["out/mean_full"] = bars.mean(x["logits"]), full.mean(x["logits"])
    return x, bars, full, found


def bar_old(case):
    x, bars, _, found = bars_of(case)
    mass, left, right = jax.nn.softmax(x["logits"]), bars.borders[:-1], bars.borders[1:]
    # What only this repository has: expected improvement by the middle of the clipped bar, and the
    # mode by mass; its quantile is wrong in the outermost bars.
    best = case.config["best_f"]
    above = (jnp.maximum(left, best) + jnp.maximum(right, best)) / 2 - best
    below = best - (jnp.minimum(left, best) + jnp.minimum(right, best)) / 2
    valid = case.arrays["out/quantile_valid"]
    quantile = bars.quantile(x["logits"], case.config["center_prob"])
    return found | {
        "out/bucket_idx": bars.index(x["y"]),
        "out/mode_mass": ((left + right) / 2)[jnp.argmax(mass, -1)],
        "out/ei_old_max": mass @ above,
        "out/ei_old_min": mass @ below,
        "out/quantile": jnp.where(valid == 1, quantile, case.arrays["out/quantile"]),
    }


def ei_full_differs(full, logits, best):
    """What the authors' expected improvement has more than E[max(y - best, 0)] in the end bars.

    At the right it leaves out the gap from `best` up to where the half-normal starts. At the left
    it has E[min(u, a)] for E[max(a - u, 0)], with u half-normal and a the distance of `best`.
    """
    mass = jax.nn.softmax(logits)
    gap = jnp.maximum(full.borders[-2] - best, 0)
    scale = full.widths[0] / norm.ppf(0.75)
    a = jnp.maximum(full.borders[1] - best, 0) / scale
    capped = 2 * (norm.pdf(0.0) - norm.pdf(a) + a * norm.cdf(-a))
    return mass[..., 0] * scale * (2 * capped - a) - mass[..., -1] * gap


def bar_new(case):
    x, bars, full, found = bars_of(case)
    del found["grad_in/y_full"]
    logits, best, onto = x["logits"], x["best_f"], BarDistribution(x["new_borders"])
    parts = [(bars, logits), (BarDistribution(x["borders2"]), x["logits2"])]
    for suffix, law in (("", bars), ("_full", full)):
        found[f"out/entropy{suffix}"] = law.entropy(logits)
        found[f"out/variance{suffix}"] = law.variance(logits)
        found[f"out/mean_of_square{suffix}"] = law.mean_of_square(logits)
        found[f"out/ei{suffix}"] = law.ei(logits, best)
        found[f"out/pi{suffix}"] = law.pi(logits, best)
    found["out/ei_full"] += ei_full_differs(full, logits, best)
    y = x["y"].at[0, 2].set(jnp.nan)
    return found | {
        "out/nll_with_nan_target_at_0_2": bars.nll(logits, y, ignore_nan_targets=True),
        "out/cdf": bars.cdf(logits[..., None, :], x["ys"]),
        "out/icdf_0p3": bars.icdf(logits, 0.3),
        "out/icdf_0p9": bars.icdf(logits, 0.9),
        "out/median": bars.median(logits),
        "out/quantile": bars.quantile(logits),
        "out/ucb": bars.ucb(logits),
        "out/mode": bars.mode(logits),
        "out/probs_on_new_borders": onto.masses(bars, logits),
        "out/average_probs": jnp.exp(onto.average(parts)),
    }


def bucket_borders(case):
    samples, bars = case.inputs["ys"], case.config["num_outputs"]
    borders = BarDistribution.from_prior_samples(samples, bars).borders
    return {
        "out/main": borders,
        "out/new": borders,
        "out/new_widened": borders * case.config["widen_borders_factor"],
        "out/from_range": jnp.linspace(*case.config["full_range"], bars + 1),
    }


def transformer_model(case):
    c = case.config
    trunk = Transformer(
        width=c["ninp"],
        depth=c["nlayers"],
        heads=c["nhead"],
        hidden=c["nhid"],
        order="post",
        position="none",
    )
    model = set_transformer(trunk, outputs=c["n_out"])

    def main(weights, inputs, n=c["single_eval_pos"]):
        params = authors.set_transformer(weights, c["nhead"], c["nlayers"])
        x, y = inputs["x"].swapaxes(0, 1), inputs["y"].T
        output = model.apply({"params": params}, x, y, jnp.full(len(x), n))
        return output.swapaxes(0, 1)[n:]

    return {
        **case.outputs_and_gradients(main),
        "out/main_single_eval_pos_0": main(case.weights, case.inputs, 0),
        "out/main_single_eval_pos_T_minus_1": main(case.weights, case.inputs, c["T"] - 1),
    }


PORTS = {
    "transformer_model": transformer_model,
    "bar_old": bar_old,
    "bar_new": bar_new,
    "bucket_borders": bucket_borders,
}
LEFT_OUT = {"bar_old": {"out/quantile_valid": "says where out/quantile may be compared"}}
