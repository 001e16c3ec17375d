"""From noise to examples, with a task that `Denoises`.

A sampler walks a process backwards. Row i of a call draws from fold_in(key, i), whatever rows are
beside it. No step reads what another one of the network kept: there is no cache.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxformer.errors import ConfigError
from jaxformer.parallel.sharding import constrain
from jaxformer.recipe import Denoises, Extra, Params
from jaxformer.tasks.gaussian_diffusion import GaussianDiffusion
from jaxformer.tasks.noising import RectifiedFlow, per_row

Network = Callable[[jax.Array, jax.Array], jax.Array]  # (x, time as it is told) -> answer


class Sampler(Protocol):
    """A way back from noise; hashable."""

    def __call__(
        self, process: Any, network: Network, x: jax.Array, keys_B: jax.Array
    ) -> jax.Array: ...


class Point(NamedTuple):
    """Where a step begins: x (B, ...) at the steps t (B,), and the noise that it may add."""

    x: jax.Array
    t: jax.Array
    noise: jax.Array


Moved = tuple[jax.Array, jax.Array]  # x one step before, and the example predicted on the way


@dataclasses.dataclass(frozen=True)
class _Stepwise:
    """Walks the steps of a respaced `GaussianDiffusion`; `spacing` as `respace` reads it."""

    spacing: str | int = 250
    clip: bool = False  # keep predicted examples in [-1, 1]

    def plan(self, process: GaussianDiffusion) -> GaussianDiffusion:
        if not isinstance(process, GaussianDiffusion):
            raise ConfigError(
                f"sampler: {type(self).__name__} walks a GaussianDiffusion, the task has a "
                f"{type(process).__name__}; give Euler or Heun"
            )
        return dataclasses.replace(process.respaced(self.spacing), clip=self.clip)

    def step(self, process: GaussianDiffusion, output: jax.Array, at: Point) -> Moved:
        """One step back, given the network's answer."""
        raise NotImplementedError

    def __call__(
        self, process: GaussianDiffusion, network: Network, x: jax.Array, keys_B: jax.Array
    ) -> jax.Array:
        plan = self.plan(process)

        def back(x: jax.Array, k: jax.Array) -> tuple[jax.Array, None]:
            t = jnp.full(len(x), k)
            keys = jax.vmap(jax.random.fold_in, (0, None))(keys_B, k)
            noise = jax.vmap(lambda key: jax.random.normal(key, x.shape[1:]))(keys)
            output = network(x, plan.network_time(t))
            return self.step(plan, output, Point(x, t, noise))[0], None

        return jax.lax.scan(back, x, jnp.arange(len(plan))[::-1])[0]


@dataclasses.dataclass(frozen=True)
class Ancestral(_Stepwise):
    """Draws x_{t-1} given x_t, step by step (DDPM, Ho et al. 2020, algorithm 2)."""

    def step(self, process: GaussianDiffusion, output: jax.Array, at: Point) -> Moved:
        mean, log_variance, start = process.reverse(output, at.x, at.t)
        noise = jnp.where(per_row(at.t, at.x) > 0, at.noise, 0.0)  # the last step adds none
        return mean + jnp.exp(log_variance / 2) * noise, start


@dataclasses.dataclass(frozen=True)
class DDIM(_Stepwise):
    """Deterministic for eta 0, as random as the posterior for 1 (Song et al. 2020, 2010.02502)."""

    spacing: str | int = 50
    eta: float = 0.0

    def step(self, process: GaussianDiffusion, output: jax.Array, at: Point) -> Moved:
        x, t, noise = at
        start = process.start(process.split(output.astype(jnp.float32))[0], x, t)
        names = ("kept", "before", "signal", "noise")
        kept, before, signal, spread = (per_row(process.at(name, t), x) for name in names)
        told = (x - signal * start) / spread  # the noise, after the example was clipped
        sigma = self.eta * jnp.sqrt((1 - before) / (1 - kept) * (1 - kept / before))
        mean = jnp.sqrt(before) * start + jnp.sqrt(1 - before - sigma**2) * told
        return mean + jnp.where(per_row(t, x) > 0, sigma * noise, 0.0), start


@dataclasses.dataclass(frozen=True)
class Euler:
    """The differential equation of a `RectifiedFlow`, in `steps` equal steps from 1 to 0."""

    steps: int = 50

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ConfigError(f"sampler.steps={self.steps}: must be at least 1")

    def velocity(self, process: RectifiedFlow, network: Network, x: jax.Array, t: Any) -> jax.Array:
        return network(x, process.network_time(jnp.full(len(x), t)))

    def move(
        self, process: RectifiedFlow, network: Network, x: jax.Array, t: Any, to: Any
    ) -> jax.Array:
        """Where x (B, ...) at the time t is at the time `to`."""
        return x + (to - t) * self.velocity(process, network, x, t)

    def __call__(
        self, process: RectifiedFlow, network: Network, x: jax.Array, keys_B: jax.Array
    ) -> jax.Array:
        del keys_B
        if not isinstance(process, RectifiedFlow):
            raise ConfigError(
                f"sampler: {type(self).__name__} walks a RectifiedFlow, the task has a "
                f"{type(process).__name__}; give Ancestral or DDIM"
            )
        times = jnp.linspace(1.0, 0.0, self.steps + 1)

        def back(x: jax.Array, ends: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
            return self.move(process, network, x, *ends), None

        return jax.lax.scan(back, x, (times[:-1], times[1:]))[0]


@dataclasses.dataclass(frozen=True)
class Heun(Euler):
    """Of second order: the mean of the velocities at both ends of a step."""

    steps: int = 25

    def move(
        self, process: RectifiedFlow, network: Network, x: jax.Array, t: Any, to: Any
    ) -> jax.Array:
        first = self.velocity(process, network, x, t)
        second = self.velocity(process, network, x + (to - t) * first, to)
        return x + (to - t) * (first + second) / 2


SAMPLERS: dict[str, Callable[[int], Sampler]] = {
    "ddpm": Ancestral,
    "ddim": DDIM,
    "euler": Euler,
    "heun": Heun,
}


def named_sampler(name: str, steps: int) -> Sampler:
    """The sampler of a config, with so many steps."""
    if name not in SAMPLERS:
        raise ConfigError(f"sample.sampler={name!r}: must be one of {', '.join(SAMPLERS)}")
    return SAMPLERS[name](steps)


def guide(
    conditional: jax.Array, unconditional: jax.Array, scale: float, channels: int | None = None
) -> jax.Array:
    """U + scale (c - u) in the first `channels`, all when None; the others stay those of c.

    Classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598).
    """
    c, u = conditional[..., :channels], unconditional[..., :channels]
    rest = conditional[..., c.shape[-1] :]
    return jnp.concatenate([u + scale * (c - u), rest], axis=-1)


def sample(
    task: Denoises,
    params: Params,
    extra: Extra,
    given: Mapping[str, Any],
    *,
    shape: tuple[int, ...],
    sampler: Sampler,
    key: jax.Array,
    rows: int | None = None,
    guidance: float = 1.0,
    guided_channels: int | None = None,
) -> jax.Array:
    """Examples as the codec decodes them, one for each row of the conditions `given`.

    `shape` is that of one latent, (H, W, C); without conditions `rows` says how many. `guidance`
    1 is the conditional answer and calls the network on no more than the rows. Of a learned
    variance only the noise is guided; `guided_channels` restricts that further, to 3 in the
    authors' DiT.

    Raises:
        ConfigError: a condition that the model does not know, or guidance without a null one.
    """
    given = {name: np.asarray(value) for name, value in given.items()}
    task.check(given)
    if guidance != 1.0:
        task.absent({name: jnp.asarray(value) for name, value in given.items()})
    count = len(next(iter(given.values()))) if given else rows
    if not count:
        raise ConfigError("sample: no rows; give conditions, or how many examples to draw")
    channels = shape[-1] if guided_channels is None else guided_channels
    rule = _Rule(task, sampler, (count, *shape), float(guidance), channels)
    return _draw(rule, params, extra, given, key)


@dataclasses.dataclass(frozen=True)
class _Rule:
    """The static part of a draw."""

    task: Any
    sampler: Sampler
    shape: tuple[int, ...]
    guidance: float
    channels: int


@functools.partial(jax.jit, static_argnums=0)
def _draw(rule: _Rule, params: Params, extra: Extra, given: Any, key: jax.Array) -> jax.Array:
    task, count = rule.task, rule.shape[0]

    def network(x: jax.Array, time: jax.Array) -> jax.Array:
        if rule.guidance == 1.0:
            return task.denoise(params, extra, x, time, given)
        both = jax.tree.map(lambda *two: jnp.concatenate(two), given, task.absent(given))
        twice = (jnp.concatenate([part, part]) for part in (x, time))
        answers = task.denoise(params, extra, *twice, both)
        return guide(*jnp.split(answers, 2), rule.guidance, rule.channels)

    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(count))
    keys = jax.vmap(jax.random.split)(keys)
    noise = jax.vmap(lambda k: jax.random.normal(k, rule.shape[1:]))(keys[:, 0])
    x = rule.sampler(task.process, network, noise, keys[:, 1])
    x = task.decode(extra, x)
    return constrain(x, (None,) * x.ndim)  # whole on every process
