"""Gradient flow: integrated as an update, its trajectories, where it ends and what surrounds it.

Everything takes a loss, a pure function of a tree of real parameters, and is pure itself: it can be
jitted, and mapped over starts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

from jaxformer.recipe import Batch, Mean, Metrics, Params, Task, TrainState, Update
from jaxformer.train.updates import step_key

Loss = Callable[[Params], jax.Array]


@dataclasses.dataclass(frozen=True)
class Integrator:
    """How to integrate: a diffrax solver, its step-size controller and its first step."""

    solver: diffrax.AbstractSolver
    controller: diffrax.AbstractStepSizeController
    first_step: float | None = None


def adaptive(rtol: float = 1e-6, atol: float = 1e-8) -> Integrator:
    """Tsitouras 5(4) with error control."""
    controller = diffrax.PIDController(rtol=rtol, atol=atol, norm=_error_norm)
    return Integrator(diffrax.Tsit5(), controller)


def _error_norm(error: Any) -> jax.Array:
    """Infinite where it is NaN, as of a trial that overflows: of NaN the controller repeats it."""
    norm = optax.tree.norm(error) / optax.tree.size(error) ** 0.5
    return jnp.where(jnp.isnan(norm), jnp.inf, norm)


def euler(step: float) -> Integrator:
    """Fixed Euler steps: gradient descent seen as a flow."""
    return Integrator(diffrax.Euler(), diffrax.ConstantStepSize(), step)


class Flowed(NamedTuple):
    """Where a flow has come, after how much time."""

    params: Params
    time: jax.Array


def flow(
    loss: Loss,
    start: Params,
    duration: float,
    integrator: Integrator | None = None,
    converged: float = 0.0,
) -> Flowed:
    """Integrate d params/dt = -grad loss for `duration`, from `start`.

    It stops early where the gradient norm falls to `converged` (0: never).
    """
    integrator = integrator or adaptive()

    def field(t: Any, params: Params, args: Any) -> Params:
        return jax.tree.map(jnp.negative, jax.grad(loss)(params))

    def arrived(t: Any, params: Params, args: Any, **_: Any) -> jax.Array:
        return optax.tree.norm(jax.grad(loss)(params)) <= converged

    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(field),
        integrator.solver,
        t0=0.0,
        t1=duration,
        dt0=integrator.first_step,
        y0=start,
        stepsize_controller=integrator.controller,
        event=diffrax.Event(arrived) if converged > 0 else None,
        max_steps=None,
        throw=False,
    )
    return Flowed(jax.tree.map(lambda y: y[-1], solution.ys), solution.ts[-1])


@dataclasses.dataclass(frozen=True)
class FlowUpdate:
    """Each step is a `flow` of the task's loss over `duration` units of time.

    The metric "time" is the flow time that was integrated, so its sum over steps is the time of the
    whole flow.
    """

    task: Task
    duration: float
    integrator: Integrator = dataclasses.field(default_factory=adaptive)
    converged: float = 0.0

    def init(self, state: TrainState) -> TrainState:
        return state.replace(opt_state={})

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = step_key(state)

        def loss(params: Params) -> jax.Array:
            return self.task.loss(params, state.extra, batch, key=key, train=True).loss

        params, time = flow(loss, state.params, self.duration, self.integrator, self.converged)
        value, gradient = jax.value_and_grad(loss)(params)
        metrics = {
            "loss": Mean.of(value),
            "gradient_norm": Mean.of(optax.tree.norm(gradient)),
            "time": Mean.of(time),
            "nonfinite": Mean.of(~jnp.isfinite(value)),
        }
        return state.replace(step=state.step + 1, params=params), metrics


def trajectory(update: Update, params: Params, steps: int) -> Params:
    """The parameters before each of `steps` updates that read no batch, and after the last.

    Every leaf has a new first axis of steps + 1.
    """
    zero = jnp.zeros((), jnp.int32)
    start = update.init(TrainState(zero, params, {}, {}, jax.random.key(0)))

    def step(state: TrainState, _: None) -> tuple[TrainState, Params]:
        return update(state, {})[0], state.params

    end, path = jax.lax.scan(step, start, length=steps)
    return jax.tree.map(lambda all, last: jnp.append(all, last[None], 0), path, end.params)


# Where it rests.


def hessian(loss: Loss, params: Params) -> jax.Array:
    """The second derivatives (n, n), parameters in the order of `ravel_pytree`."""
    flat, unravel = ravel_pytree(params)
    return jax.hessian(lambda x: loss(unravel(x)))(flat)


def spectrum(loss: Loss, params: Params) -> jax.Array:
    """The eigenvalues (n,) of the Hessian, ascending.

    At a fixed point: negative ones lead away from it, and those that are 0 along a manifold of
    fixed points, such as a symmetry makes.
    """
    return jnp.linalg.eigvalsh(hessian(loss, params))


class FixedPoint(NamedTuple):
    """A point where the gradient is small, and how small."""

    params: Params
    gradient_norm: jax.Array
    loss: jax.Array


def newton(loss: Loss, start: Params, steps: int = 20, flat: float = 1e-6) -> FixedPoint:
    """A fixed point near `start`, by Newton's method on the gradient: saddles are found too.

    Directions whose curvature is below `flat` of the largest are left as they are: along a symmetry
    of the loss there is nothing to solve for. Converges quadratically from close by; from afar it
    may not, which `gradient_norm` tells.
    """
    x, unravel = ravel_pytree(start)

    def step(_: int, x: jax.Array) -> jax.Array:
        gradient = jax.grad(lambda x: loss(unravel(x)))(x)
        values, vectors = jnp.linalg.eigh(hessian(loss, unravel(x)))
        curved = jnp.abs(values) > flat * jnp.abs(values).max()
        inverse = jnp.where(curved, 1 / jnp.where(curved, values, 1), 0)
        return x - vectors @ (inverse * (vectors.T @ gradient))

    return _fixed_point(loss, unravel(jax.lax.fori_loop(0, steps, step, x)))


def settle(
    loss: Loss,
    start: Params,
    converged: float = 1e-5,
    longest: float = 1e4,
    integrator: Integrator | None = None,
) -> FixedPoint:
    """Where the flow from `start` ends: the gradient norm is `converged`, or the time `longest`.

    The integrator's tolerance must be the smaller, or the flow never comes to rest: by default it
    is 1e-6, about which the gradient then hovers.
    """
    return _fixed_point(loss, flow(loss, start, longest, integrator, converged).params)


def _fixed_point(loss: Loss, params: Params) -> FixedPoint:
    value, gradient = jax.value_and_grad(loss)(params)
    return FixedPoint(params, optax.tree.norm(gradient), value)


class Basins(NamedTuple):
    """Where each of many starts ends: the fixed points (starts, ...), and which are one."""

    ends: FixedPoint
    labels: np.ndarray  # (starts,) int: the number of the attractor, the commonest being 0
    attractors: np.ndarray  # (attractors,) int: a start that ends at each

    def shares(self) -> np.ndarray:
        """The share of starts that end at each attractor."""
        return np.bincount(self.labels) / len(self.labels)


def basins(
    settle: Callable[[Params], FixedPoint],
    starts: Params,
    same_by: Callable[[Params], jax.Array] = lambda params: ravel_pytree(params)[0],
    within: float = 1e-3,
) -> Basins:
    """Follow every start (leading axis of all leaves) to its end, and tell the ends apart.

    settle: such as `functools.partial(settle, loss)`.
    same_by: what must agree, an array, for two ends to be one: of parameters that a symmetry turns
        into each other, what it leaves alone, such as their product.
    within: by how much it may differ, in the norm.
    """

    def follow(start: Params) -> tuple[FixedPoint, jax.Array]:
        end = settle(start)
        return end, jnp.ravel(same_by(end.params))

    ends, features = jax.device_get(jax.jit(jax.vmap(follow))(starts))
    found: list[int] = []
    labels = np.zeros(len(features), int)
    for index, feature in enumerate(features):
        apart = np.array([np.linalg.norm(feature - features[other]) for other in found])
        if not np.any(apart <= within):
            found.append(index)
            apart = np.append(apart, 0.0)
        labels[index] = apart.argmin()
    order = np.argsort(-np.bincount(labels), kind="stable")
    return Basins(ends, np.argsort(order)[labels], np.asarray(found)[order])
