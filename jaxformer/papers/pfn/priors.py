"""Priors over data sets: a frozen value draws one data set of T rows from a key.

A data set is {"x": (T, F), "y": (T,), "target": (T,)}: what a context row shows of a function is
y, what a query row is scored on is the target; they differ where the prior has noise-free targets.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxformer.recipe import Batch, ConfigError

DataSet = dict[str, jax.Array]
Shape = Callable[..., Any]  # (squared distance, array module) -> correlation
ContextLaw = Callable[[jax.Array], jax.Array]  # key -> n, int32
Gamma = tuple[float, float]  # concentration and rate; their quotient is the mean


class Prior(Protocol):
    """A law of data sets."""

    @property
    def features(self) -> int: ...

    def __call__(self, key: jax.Array, T: int) -> DataSet: ...


# How many rows are context: 0 .. limit - 1, drawn once per step for all rows of a batch.


def weighted(limit: int) -> ContextLaw:
    """P(n = i) proportional to 1 / (limit - i): a query row is as often asked at every n."""
    _check_limit(limit)
    return lambda key: jax.random.categorical(key, -jnp.log(limit - jnp.arange(limit)))


def uniform(limit: int) -> ContextLaw:
    """Every n below `limit` alike."""
    _check_limit(limit)
    return lambda key: jax.random.randint(key, (), 0, limit)


def fixed(n: int) -> ContextLaw:
    return lambda key: jnp.asarray(n)


def _check_limit(limit: int) -> None:
    if limit < 1:
        raise ConfigError(f"data.limit: {limit}; contexts of 0 .. limit - 1 rows need at least 1")


@dataclasses.dataclass(frozen=True)
class DataSets:
    """`draw_rows` of a `DeviceData`: rows are data sets, and all have the same n, (B,) int32."""

    prior: Prior
    T: int
    context: ContextLaw

    def __call__(self, step_key: jax.Array, row_keys: jax.Array) -> Batch:
        # Row keys are fold_in(step_key, row): no row has this number.
        n = self.context(jax.random.fold_in(step_key, 2**32 - 1))
        sets = jax.vmap(lambda key: self.prior(key, self.T))(row_keys)
        return {**sets, "n": jnp.full(row_keys.shape, n, jnp.int32)}


@dataclasses.dataclass(frozen=True)
class Ridge:
    """Linear functions without intercept; the target is free of the noise that y has."""

    features: int = 1
    weight_std: float = 0.1
    noise_std: float = 0.1

    def __call__(self, key: jax.Array, T: int) -> DataSet:
        x_key, w_key, noise_key = jax.random.split(key, 3)
        x = jax.random.uniform(x_key, (T, self.features))
        target = x @ (self.weight_std * jax.random.normal(w_key, (self.features,)))
        return {
            "x": x,
            "y": target + self.noise_std * jax.random.normal(noise_key, (T,)),
            "target": target,
        }


# Gaussian processes.


def rbf(d2: Any, xp: ModuleType = jnp) -> Any:
    """exp(-d^2 / 2) of the squared distance in lengthscales."""
    return xp.exp(-d2 / 2)


def matern52(d2: Any, xp: ModuleType = jnp) -> Any:
    """Matérn with nu = 5/2: (1 + r + r^2 / 3) exp(-r), r = sqrt(5) d."""
    r = xp.sqrt(5 * d2)
    return (1 + r + r**2 / 3) * xp.exp(-r)


def factor_by_columns(gram: jax.Array) -> jax.Array:
    """Lower Cholesky factor (n, n), one column after another."""

    def column(j: jax.Array, factor: jax.Array) -> jax.Array:
        rest = gram[:, j] - factor @ factor[j]
        return factor.at[:, j].set(jnp.where(jnp.arange(len(gram)) < j, 0, rest / rest[j] ** 0.5))

    return jax.lax.fori_loop(0, len(gram), column, jnp.zeros_like(gram))


@dataclasses.dataclass(frozen=True)
class GP:
    """A zero-mean Gaussian process on the unit cube; `noise` is a variance and part of the target.

    `lengthscale` is one number or one per feature. `equidistant` puts the rows on a grid (F = 1).
    """

    features: int = 1
    shape: Shape = rbf
    outputscale: ArrayLike = 0.1
    lengthscale: ArrayLike = 0.1
    noise: ArrayLike = 0.1
    equidistant: bool = False
    # Of the outputscale, part of the noise. float32 factors T = 2010 rows at noise 1e-4 without it
    # (measured); it is for priors that draw less noise than 5e-8 T outputscale.
    jitter: float = 1e-6

    def __post_init__(self) -> None:
        if self.equidistant and self.features != 1:
            raise ConfigError(f"data.prior.features: {self.features}; equidistant rows need 1")

    @property
    def noise_variance(self) -> ArrayLike:
        """Of the data as they are drawn."""
        return self.noise + self.jitter * self.outputscale

    def function(self, key: jax.Array, x: jax.Array) -> jax.Array:
        """Noisy values (T,) of one draw at x (T, F)."""
        scaled = x / jnp.asarray(self.lengthscale)
        d2 = jnp.square(scaled[:, None] - scaled).sum(-1)
        gram = self.outputscale * self.shape(d2) + self.noise_variance * jnp.eye(len(x))
        # The batched LAPACK calls of jaxlib 0.10 wait in the thread pool that runs them: on several
        # CPU devices they wait for each other for ever.
        factor = jax.lax.platform_dependent(
            gram, cpu=factor_by_columns, default=jnp.linalg.cholesky
        )
        return factor @ jax.random.normal(key, x.shape[:1])

    def __call__(self, key: jax.Array, T: int) -> DataSet:
        x_key, y_key = jax.random.split(key)
        if self.equidistant:
            x = jnp.linspace(0, 1, T)[:, None]
        else:
            x = jax.random.uniform(x_key, (T, self.features))
        y = self.function(y_key, x)
        return {"x": x, "y": y, "target": y}


def draw_gammas(key: jax.Array, laws: Sequence[Gamma]) -> jax.Array:
    """One number of each law. A single call: each more costs a second of compilation."""
    concentration, rate = jnp.asarray(laws).T
    return jax.random.gamma(key, concentration) / rate


@dataclasses.dataclass(frozen=True)
class HyperGP:
    """A Gaussian process whose hyperparameters are drawn first, anew for every data set."""

    features: int = 1
    shape: Shape = matern52
    lengthscale: Gamma = (3.0, 6.0)
    outputscale: Gamma = (0.5, 0.15)
    noise: Gamma = (1.1, 0.05)
    noise_floor: float = 1e-4

    @property
    def laws(self) -> list[Gamma]:
        """Of the outputscale, the noise and each lengthscale."""
        return [self.outputscale, self.noise, *[self.lengthscale] * self.features]

    def gp(self, numbers: Any) -> GP:
        """The process with these hyperparameters, in the order of `laws`."""
        return GP(self.features, self.shape, numbers[0], numbers[2:], numbers[1])

    def hyper(self, key: jax.Array) -> jax.Array:
        """Hyperparameters in the order of `laws`."""
        return draw_gammas(key, self.laws).at[1].max(self.noise_floor)

    def __call__(self, key: jax.Array, T: int) -> DataSet:
        hyper_key, draw_key = jax.random.split(key)
        return self.gp(self.hyper(hyper_key))(draw_key, T)


@dataclasses.dataclass(frozen=True)
class Mapped:
    """Another prior with its outputs sent through `function`, such as `jax.nn.sigmoid`."""

    prior: Prior
    function: Callable[[jax.Array], jax.Array]

    @property
    def features(self) -> int:
        return self.prior.features

    def __call__(self, key: jax.Array, T: int) -> DataSet:
        drawn = self.prior(key, T)
        return {**drawn, "y": self.function(drawn["y"]), "target": self.function(drawn["target"])}


def min_max(y: jax.Array) -> jax.Array:
    """Stretched over [0, 1]."""
    return (y - y.min()) / (y.max() - y.min())


@dataclasses.dataclass(frozen=True)
class Within:
    """Another prior without the data sets that leave [low, high): they are drawn again."""

    prior: Prior
    low: float
    high: float

    @property
    def features(self) -> int:
        return self.prior.features

    def __call__(self, key: jax.Array, T: int) -> DataSet:
        def outside(state: tuple[jax.Array, DataSet]) -> jax.Array:
            y = state[1]["y"]
            return ~((y >= self.low) & (y < self.high)).all()

        def again(state: tuple[jax.Array, DataSet]) -> tuple[jax.Array, DataSet]:
            following, here = jax.random.split(state[0])
            return following, self.prior(here, T)

        return jax.lax.while_loop(outside, again, again((key, {})))[1]
