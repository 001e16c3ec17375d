"""Optimisers and schedules from optax, with parameter groups that must cover every parameter."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax

from jaxformer import paths
from jaxformer.parallel.sharding import PARAMETER_RULES, Rule, axes_of
from jaxformer.recipe import ConfigError, Params

Schedule = Callable[[Any], Any]


def _choose(field: str, name: str, table: Mapping[str, Any]) -> Any:
    if name not in table:
        raise ConfigError(f"{field}: {name!r} is unknown; allowed: {', '.join(sorted(table))}")
    return table[name]


def _decay(kind: str, peak: float, steps: int, final: float) -> Schedule:
    shapes: dict[str, Callable[[], Schedule]] = {
        "constant": lambda: optax.constant_schedule(peak),
        "cosine": lambda: optax.cosine_decay_schedule(peak, max(steps, 1), final),
        "linear": lambda: optax.linear_schedule(peak, peak * final, max(steps, 1)),
    }
    return _choose("optim.schedule", kind, shapes)()


def schedule(
    peak: float, steps: int, *, kind: str = "cosine", warmup: int = 0, final: float = 0.0
) -> Schedule:
    """Learning rate: `warmup` linear steps up to `peak`, then a decay to `final * peak` at `steps`.

    `kind` is constant | cosine | linear, or rsqrt: peak * sqrt(warmup / step) without an end.
    """
    if kind == "rsqrt":
        hold = max(warmup, 1)
        return lambda step: peak * jnp.minimum((step + 1) / hold, jnp.sqrt(hold / (step + 1)))
    after = _decay(kind, peak, steps - warmup, final)
    if warmup == 0:
        return after
    # The first step already learns: warm-up from peak / (warmup + 1), not from 0.
    ramp = optax.linear_schedule(peak / (warmup + 1), peak, warmup)
    return optax.join_schedules([ramp, after], [warmup])


def decays(params: Params) -> Any:
    """Which leaves weight decay touches: all but biases, norm scales and scalars."""
    return paths.map_named(
        lambda name, leaf: leaf.ndim > 0 and not re.search(r"(^|/)(bias|scale)$", name), params
    )


def muon_dimensions(rules: Sequence[Rule] = PARAMETER_RULES) -> Callable[[Params], Any]:
    """Which axes of each leaf Muon orthogonalises; None sends the leaf to Adam.

    Read off the logical axes, because optax goes by rank alone: it would give every 3-D kernel to
    Adam and every stack of norm scales to Muon.
    """

    def one(name: str, leaf: Any) -> optax.contrib.MuonDimensionNumbers | None:
        axes = axes_of(name, leaf.ndim, rules)
        if axes is None:
            plain = leaf.ndim == 2 and name.rpartition("/")[2] == "kernel"
            return optax.contrib.MuonDimensionNumbers(0, 1) if plain else None
        contracted, produced = axes
        stacked = contracted[:1] == ["layers"]
        inputs = tuple(range(stacked, len(contracted)))
        outputs = tuple(range(len(contracted), len(contracted) + len(produced)))
        return optax.contrib.MuonDimensionNumbers(inputs, outputs) if inputs else None

    return lambda params: paths.map_named(one, params)


class Factory(Protocol):
    """An optimiser: a learning rate (schedule) and a weight decay give a transformation."""

    def __call__(self, rate: Any, weight_decay: float) -> optax.GradientTransformation: ...


def adamw(b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8) -> Factory:
    return lambda rate, weight_decay: optax.adamw(
        rate, b1, b2, eps, weight_decay=weight_decay, mask=decays
    )


def lamb(b1: float = 0.9, b2: float = 0.999, eps: float = 1e-6) -> Factory:
    """Adam whose step is of the size of each leaf (You et al. 2020, arXiv 1904.00962), at most."""

    def trust(updates: Params, state: Any, params: Params) -> tuple[Params, Any]:
        def one(u: jax.Array, p: jax.Array) -> jax.Array:
            size, step = jnp.linalg.norm(p), jnp.linalg.norm(u)
            given = (size > 0) & (step > 0)
            return u * jnp.where(given, jnp.minimum(size / jnp.where(given, step, 1), 1), 1)

        return jax.tree.map(one, updates, params), state

    def make(rate: Any, weight_decay: float) -> optax.GradientTransformation:
        adam = optax.scale_by_adam(b1, b2, eps)
        decay = optax.add_decayed_weights(weight_decay, decays)
        ratio = optax.GradientTransformation(lambda params: optax.EmptyState(), trust)
        return optax.chain(adam, decay, ratio, optax.scale_by_learning_rate(rate))

    return make


def sgd(momentum: float = 0.0) -> Factory:
    def make(rate: Any, weight_decay: float) -> optax.GradientTransformation:
        step = optax.sgd(rate, momentum or None)
        return optax.chain(optax.add_decayed_weights(weight_decay, decays), step)

    return make


def lion(b1: float = 0.9, b2: float = 0.99) -> Factory:
    return lambda rate, weight_decay: optax.lion(
        rate, b1, b2, weight_decay=weight_decay, mask=decays
    )


def signum(beta: float = 0.965) -> Factory:
    """Steps along the signs of a running mean of gradients (Bernstein et al. 2018, 1802.04434)."""
    return lion(beta, beta)


def muon(beta: float = 0.95, rules: Sequence[Rule] = PARAMETER_RULES) -> Factory:
    """Muon for linear maps, Adam for the rest, updates scaled to Adam's size (0.2 RMS)."""
    return lambda rate, weight_decay: optax.contrib.muon(
        rate,
        beta=beta,
        weight_decay=weight_decay,
        weight_decay_mask=decays,
        adam_weight_decay=weight_decay,
        consistent_rms=0.2,
        muon_weight_dimension_numbers=muon_dimensions(rules),
    )


def schedule_free(b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8) -> Factory:
    """Schedule-free AdamW; evaluation reads its averaged weights (`averaged`)."""

    def make(rate: Any, weight_decay: float) -> optax.GradientTransformation:
        # The averaging takes the place of momentum, so the inner Adam has none.
        inner = optax.chain(
            optax.scale_by_rms(b2, eps, eps_in_sqrt=False, bias_correction=True),
            optax.add_decayed_weights(weight_decay, decays),
            optax.scale_by_learning_rate(rate),
        )
        return optax.contrib.schedule_free(inner, rate, b1)

    return make


@dataclasses.dataclass(frozen=True)
class Group:
    """Parameters whose names match `pattern`, with their own rate and decay, or none at all.

    `clip` is of their gradient norm alone.
    """

    pattern: str
    rate_scale: float = 1.0
    weight_decay: float | None = None
    frozen: bool = False
    optimizer: Factory | None = None
    clip: float | None = None


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """An optimiser with its schedule (kept for logging), clipping and parameter groups."""

    transform: optax.GradientTransformation
    schedule: Schedule

    def averaged(self, opt_state: Any, params: Params) -> Params:
        """The weights to evaluate: the average where the optimiser keeps one."""

        def is_average(node: Any) -> bool:
            return isinstance(node, optax.contrib.ScheduleFreeState)

        for node in filter(is_average, jax.tree.leaves(opt_state, is_leaf=is_average)):
            params = jax.tree.map(partial(_schedule_free_average, node.b1), params, node.z)
        return params


def _schedule_free_average(b1: Any, y: Any, z: Any) -> Any:
    """The x of y = b1 x + (1 - b1) z; leaves of another parameter group are masked and stay."""
    return y if isinstance(z, optax.MaskedNode) else (y - (1 - b1) * z) / b1


def optimizer(
    factory: Factory,
    rate: Schedule,
    *,
    weight_decay: float = 0.0,
    clip: float | None = None,
    groups: Sequence[Group] = (),
) -> Optimizer:
    """Clip the global gradient norm to `clip`, then let each group's optimiser step.

    Raises:
        ConfigError: (at init) a parameter in no group, or in two.
    """
    if not groups:
        step = factory(rate, weight_decay)
    else:
        steps = {str(i): _group_step(g, factory, rate, weight_decay) for i, g in enumerate(groups)}
        step = optax.partition(steps, lambda params: _labels(groups, params))
    chain = [optax.clip_by_global_norm(clip)] if clip else []
    return Optimizer(optax.chain(*chain, step), rate)


def _group_step(
    group: Group, factory: Factory, rate: Schedule, weight_decay: float
) -> optax.GradientTransformation:
    if group.frozen:
        return optax.set_to_zero()
    decay = weight_decay if group.weight_decay is None else group.weight_decay
    step = (group.optimizer or factory)(lambda count: rate(count) * group.rate_scale, decay)
    return optax.chain(optax.clip_by_global_norm(group.clip), step) if group.clip else step


def _labels(groups: Sequence[Group], params: Params) -> Any:
    def label(name: str, leaf: Any) -> str:
        found = [i for i, group in enumerate(groups) if re.search(group.pattern, name)]
        if len(found) != 1:
            patterns = ", ".join(repr(group.pattern) for group in groups)
            raise ConfigError(
                f"optim.groups: parameter {name!r} is in {len(found)} groups of {patterns}; "
                "make the patterns cover every parameter exactly once"
            )
        return str(found[0])

    return paths.map_named(label, params)


FACTORIES: dict[str, Callable[..., Factory]] = {
    "adamw": adamw,
    "lamb": lamb,
    "sgd": sgd,
    "lion": lion,
    "signum": signum,
    "muon": muon,
    "schedule_free": schedule_free,
}


def build(config: Mapping[str, Any], steps: int, groups: Sequence[Group] = ()) -> Optimizer:
    """The optimiser of a config's `optim` section (see `jaxformer.config.base`).

    With `groups` each of them is clipped by itself, at `clip` where it has none of its own.
    """
    factory = _choose("optim.name", config["name"], FACTORIES)
    rate = schedule(
        config["learning_rate"],
        steps,
        kind=config["schedule"],
        warmup=config["warmup_steps"],
        final=config["final"],
    )
    clip = config["clip"] or None
    return optimizer(
        factory(**config.get("arguments", {})),
        rate,
        weight_decay=config["weight_decay"],
        clip=None if groups else clip,
        groups=[dataclasses.replace(g, clip=g.clip or clip) for g in groups],
    )
