"""Gradient flow as an update, integrated by diffrax."""

from __future__ import annotations

import dataclasses
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import optax

from jaxformer.recipe import Batch, Mean, Metrics, Params, Task, TrainState
from jaxformer.train.updates import step_key


@dataclasses.dataclass(frozen=True)
class Integrator:
    """How to integrate: a diffrax solver, its step-size controller and its first step."""

    solver: diffrax.AbstractSolver
    controller: diffrax.AbstractStepSizeController
    first_step: float | None = None


def adaptive(rtol: float = 1e-6, atol: float = 1e-8) -> Integrator:
    """Tsitouras 5(4) with error control."""
    return Integrator(diffrax.Tsit5(), diffrax.PIDController(rtol=rtol, atol=atol))


def euler(step: float) -> Integrator:
    """Fixed Euler steps: gradient descent seen as a flow."""
    return Integrator(diffrax.Euler(), diffrax.ConstantStepSize(), step)


@dataclasses.dataclass(frozen=True)
class FlowUpdate:
    """Each step integrates d params/dt = -grad loss over `duration` units of flow time.

    It stops early where the gradient norm falls to `converged` (0: never). The metric "time" is
    the flow time that was integrated, so its sum over steps is the time of the whole flow.
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

        def field(t: Any, params: Params, args: Any) -> Params:
            return jax.tree.map(jnp.negative, jax.grad(loss)(params))

        def arrived(t: Any, params: Params, args: Any, **_: Any) -> jax.Array:
            return optax.tree.norm(jax.grad(loss)(params)) <= self.converged

        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(field),
            self.integrator.solver,
            t0=0.0,
            t1=self.duration,
            dt0=self.integrator.first_step,
            y0=state.params,
            stepsize_controller=self.integrator.controller,
            event=diffrax.Event(arrived) if self.converged > 0 else None,
            max_steps=None,
            throw=False,
        )
        params = jax.tree.map(lambda y: y[-1], solution.ys)
        value, gradient = jax.value_and_grad(loss)(params)
        metrics = {
            "loss": Mean.of(value),
            "gradient_norm": Mean.of(optax.tree.norm(gradient)),
            "time": Mean.of(solution.ts[-1]),
            "nonfinite": Mean.of(~jnp.isfinite(value)),
        }
        return state.replace(step=state.step + 1, params=params), metrics
