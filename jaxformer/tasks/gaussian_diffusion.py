"""Diffusion in discrete steps of normal noise: DDPM (arXiv 2006.11239) and its improvements.

What the network learns of the variance, and the bound that trains it, are of Nichol & Dhariwal
2021, arXiv 2102.09672.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxformer.errors import ConfigError
from jaxformer.tasks.noising import per_row, row_mean


def linear_betas(steps: int) -> np.ndarray:
    """1e-4 to 0.02 over 1000 steps, and as much noise in all over fewer (arXiv 2006.11239)."""
    return np.linspace(0.1 / steps, 20.0 / steps, steps)


def cosine_betas(steps: int) -> np.ndarray:
    """What is kept goes as cos^2 (Nichol & Dhariwal 2021, arXiv 2102.09672, eq. 17)."""
    at = np.arange(steps + 1) / steps
    kept = np.cos((at + 0.008) / 1.008 * math.pi / 2) ** 2
    return np.minimum(1 - kept[1:] / kept[:-1], 0.999)


SCHEDULES = {"linear": linear_betas, "squaredcos_cap_v2": cosine_betas, "cosine": cosine_betas}


@dataclasses.dataclass(frozen=True)
class LearnedRange:
    """The network tells the variance, between that of the posterior and beta (2102.09672, eq. 15).

    Its answer has twice the channels: the noise, then v with f = (v + 1) / 2 and
    log sigma^2 = f log beta + (1 - f) log of the posterior's variance.
    """

    learned = True

    def log(self, process: GaussianDiffusion, code: jax.Array | None, t: jax.Array) -> jax.Array:
        assert code is not None
        low, high = (per_row(process.at(table, t), code) for table in ("log_posterior", "log_beta"))
        share = (code.astype(jnp.float32) + 1) / 2
        return share * high + (1 - share) * low


@dataclasses.dataclass(frozen=True)
class FixedVariance:
    """The variance of the posterior, or, where `large`, beta (Ho et al. 2020, section 3.2)."""

    large: bool = True
    learned = False

    def log(self, process: GaussianDiffusion, code: jax.Array | None, t: jax.Array) -> jax.Array:
        del code
        return process.at("log_beta_first_posterior" if self.large else "log_posterior", t)


class Reverse(NamedTuple):
    """p(x_{t-1} | x_t): mean and log variance, and the x_0 it was made from, each (B, ...)."""

    mean: jax.Array
    log_variance: jax.Array
    start: jax.Array


@dataclasses.dataclass(frozen=True)
class GaussianDiffusion:
    """Noise added in steps (Ho et al. 2020, arXiv 2006.11239; Nichol & Dhariwal 2021).

    The network predicts the noise, and with `LearnedRange` the variance of the way back, trained
    by a variational bound of weight 1 that does not touch the noise. `kept` are the steps, of
    `steps`, that are walked (None: all); t counts the kept ones and the network is told the
    original ones. `times`, if any, are those drawn in training, in place of all. `clip` keeps
    predicted examples in [-1, 1]. Tables are float64 on the host.

    Raises:
        ConfigError: a schedule, step or time that there is not.
    """

    steps: int = 1000
    schedule: str = "linear"
    variance: LearnedRange | FixedVariance = LearnedRange()
    kept: tuple[int, ...] | None = None
    times: tuple[int, ...] | None = None
    clip: bool = False

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise ConfigError(
                f"diffusion.schedule={self.schedule!r}: must be one of {', '.join(SCHEDULES)}"
            )
        if self.steps < 2:
            raise ConfigError(f"diffusion.steps={self.steps}: must be at least 2")
        for name, chosen, end in (
            ("kept", self.kept, self.steps),
            ("times", self.times, len(self.original)),
        ):
            if chosen is not None and not (chosen and 0 <= min(chosen) <= max(chosen) < end):
                raise ConfigError(f"diffusion.{name}={chosen}: must be steps from 0 to {end - 1}")

    @functools.cached_property
    def original(self) -> np.ndarray:
        """(n,) the original step of each kept one."""
        return np.arange(self.steps) if self.kept is None else np.asarray(self.kept)

    def __len__(self) -> int:
        return len(self.original)

    @functools.cached_property
    def tables(self) -> dict[str, np.ndarray]:
        """By step, (n,) float64; `kept` is the product of 1 - beta up to and with the step."""
        kept = np.cumprod(1 - SCHEDULES[self.schedule](self.steps))[self.original]
        before = np.append(1.0, kept[:-1])
        beta = 1 - kept / before
        posterior = beta * (1 - before) / (1 - kept)
        # The first is 0: its log is taken of the second in its place.
        finite = np.append(posterior[1], posterior[1:]) if len(kept) > 1 else posterior
        return {
            "beta": beta,
            "kept": kept,
            "before": before,
            "signal": np.sqrt(kept),
            "noise": np.sqrt(1 - kept),
            "from_start": beta * np.sqrt(before) / (1 - kept),
            "from_x": (1 - before) * np.sqrt(1 - beta) / (1 - kept),
            "log_beta": np.log(beta),
            "log_posterior": np.log(np.maximum(finite, 1e-300)),
            "log_beta_first_posterior": np.log(np.append(finite[:1], beta[1:])),
        }

    def at(self, table: str, t: jax.Array) -> jax.Array:
        """A table's numbers at steps t, float32."""
        return jnp.asarray(self.tables[table], jnp.float32)[t]

    def respaced(self, spacing: str | int) -> GaussianDiffusion:
        """The same process on fewer steps: see `respace`."""
        if self.kept is not None:
            raise ConfigError("diffusion: is respaced already; respace the whole process")
        return dataclasses.replace(self, kept=respace(self.steps, spacing), times=None)

    # What training needs.

    def outputs(self, channels: int) -> int:
        return 2 * channels if self.variance.learned else channels

    def draw(self, key: jax.Array) -> jax.Array:
        if self.times is not None:
            return jax.random.choice(key, jnp.asarray(self.times, jnp.int32))
        return jax.random.randint(key, (), 0, len(self))

    def mix(self, x: jax.Array, noise: jax.Array, t: jax.Array) -> jax.Array:
        """A draw of q(x_t | x_0 = x)."""
        return per_row(self.at("signal", t), x) * x + per_row(self.at("noise", t), x) * noise

    def network_time(self, t: jax.Array) -> jax.Array:
        return jnp.asarray(self.original, jnp.int32)[t]

    def losses(
        self, output: jax.Array, x: jax.Array, noise: jax.Array, t: jax.Array
    ) -> dict[str, jax.Array]:
        """That of the noise, "mse", and the bound on a learned variance, "vb", in bits."""
        output = output.astype(jnp.float32)
        predicted, code = self.split(output)
        found = {"mse": row_mean(jnp.square(predicted - noise))}
        if code is not None:
            frozen = jnp.concatenate([jax.lax.stop_gradient(predicted), code], axis=-1)
            found["vb"] = self.bound(frozen, x, self.mix(x, noise, t), t)
        return found

    # The way back.

    def split(self, output: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """The noise that an answer predicts, and its code of the variance."""
        if not self.variance.learned:
            return output, None
        noise, code = jnp.split(output, 2, axis=-1)
        return noise, code

    def start(self, noise: jax.Array, x_t: jax.Array, t: jax.Array) -> jax.Array:
        """The x_0 that x_t and its noise tell."""
        x = (x_t - per_row(self.at("noise", t), x_t) * noise) / per_row(self.at("signal", t), x_t)
        return jnp.clip(x, -1, 1) if self.clip else x

    def posterior(self, start: jax.Array, x_t: jax.Array, t: jax.Array) -> jax.Array:
        """The mean of q(x_{t-1} | x_t, x_0)."""
        return (
            per_row(self.at("from_start", t), x_t) * start
            + per_row(self.at("from_x", t), x_t) * x_t
        )

    def reverse(self, output: jax.Array, x_t: jax.Array, t: jax.Array) -> Reverse:
        """One step back from x_t, given the network's answer."""
        noise, code = self.split(output.astype(jnp.float32))
        start = self.start(noise, x_t, t)
        log_variance = self.variance.log(self, code, t)
        if log_variance.ndim == 1:
            log_variance = jnp.broadcast_to(per_row(log_variance, x_t), x_t.shape)
        return Reverse(self.posterior(start, x_t, t), log_variance, start)

    def bound(self, output: jax.Array, x: jax.Array, x_t: jax.Array, t: jax.Array) -> jax.Array:
        """The term of the variational bound (B,), in bits per dimension.

        KL(q(x_{t-1} | x_t, x_0) || p) for t > 0, and for t = 0 the likelihood of the 256 levels
        that lie 2/255 apart in [-1, 1].
        """
        unclipped = dataclasses.replace(self, clip=False)
        p = unclipped.reverse(output, x_t, t)
        true = self.posterior(x, x_t, t), per_row(self.at("log_posterior", t), x)
        kl = row_mean(gaussian_kl(*true, p.mean, p.log_variance))
        nll = -row_mean(level_log_likelihood(x, p.mean, p.log_variance / 2))
        return jnp.where(t == 0, nll, kl) / math.log(2)


def respace(steps: int, spacing: str | int) -> tuple[int, ...]:
    """Which of `steps` are kept.

    A number n keeps n, evenly: step k is k (steps - 1) / (n - 1), rounded half to even. "a,b,..."
    keeps so many of each of as many equal stretches; "ddimN" keeps N at a whole stride from 0.

    Raises:
        ConfigError: more steps than there are, or no such stride.
    """
    text = str(spacing)
    try:
        if text.startswith("ddim"):
            wanted = int(text.removeprefix("ddim"))
            strides = (range(0, steps, i) for i in range(1, steps))
            return next(tuple(kept) for kept in strides if len(kept) == wanted)
        counts = [int(count) for count in text.split(",")]
        kept: list[int] = []
        for i, count in enumerate(counts):
            size = steps // len(counts) + (i < steps % len(counts))
            if not 1 <= count <= size:
                raise ValueError
            first = i * (steps // len(counts)) + min(i, steps % len(counts))
            stride = (size - 1) / (count - 1) if count > 1 else 1.0
            at = 0.0
            for _ in range(count):  # added up: the authors' rounding errors are kept
                kept.append(first + round(at))
                at += stride
        return tuple(kept)
    except (ValueError, StopIteration):
        raise ConfigError(
            f"diffusion.spacing={text!r}: must be a number of steps up to {steps}, several with "
            "commas between, or 'ddimN' where a whole stride gives N"
        ) from None


def gaussian_kl(
    mean: jax.Array, log_variance: jax.Array, other_mean: jax.Array, other_log_variance: jax.Array
) -> jax.Array:
    """KL of normal distributions, elementwise, in nats."""
    return 0.5 * (
        other_log_variance
        - log_variance
        - 1
        + jnp.exp(log_variance - other_log_variance)
        + jnp.square(mean - other_mean) * jnp.exp(-other_log_variance)
    )


def level_log_likelihood(x: jax.Array, mean: jax.Array, log_scale: jax.Array) -> jax.Array:
    """Ln of a normal's mass within 1/255 of x, elementwise; the outermost levels are open.

    The distribution function is approximated by a tanh, as in the authors' code.
    """

    def below(at: jax.Array) -> jax.Array:
        return 0.5 * (1 + jnp.tanh(math.sqrt(2 / math.pi) * (at + 0.044715 * at**3)))

    scale = jnp.exp(-log_scale)
    upper, lower = (below(scale * (x - mean + side / 255)) for side in (1, -1))
    mass = jnp.where(x < -0.999, upper, jnp.where(x > 0.999, 1 - lower, upper - lower))
    return jnp.log(jnp.maximum(mass, 1e-12))
