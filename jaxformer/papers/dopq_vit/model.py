"""DopQ-ViT: a tangent quantiser for attention, and a robust scale for the channels of norms.

Symbols of the paper: A the probabilities, S their clip scale, a the sharpness of the tangent,
n = 2^k - 1 the largest code; s_c and z_c scale and zero point of channel c.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxformer.compress.procedures import RepQ, uniform_rules
from jaxformer.compress.quantized import Quantized
from jaxformer.compress.quantizers import Uniform, check_bits
from jaxformer.compress.reparameterize import collapse
from jaxformer.compress.search import each, least, row_errors
from jaxformer.compress.straight_through import round_ste
from jaxformer.compress.walk import Linear, Product
from jaxformer.errors import ConfigError

State = Mapping[str, jax.Array]
STEEPEST = math.pi - 0.05  # of the symmetric form, whose tangent is infinite at pi

# ----------------------------------------------------------------------------------- TanQ


@dataclasses.dataclass(frozen=True)
class SymmetricTan:
    """Codes that are dense near 0 and near S: y = 1/2 + tan(a (x - 1/2)) / (2 tan(a / 2)).

    x = A / S, a between 0, which is uniform, and pi.
    """

    bits: int

    def __post_init__(self) -> None:
        check_bits(self.bits, 2)

    @property
    def state(self) -> dict[str, float]:
        return {"scale": 1.0, "sharpness": 1.0}

    def __call__(self, x: jax.Array, scale: jax.Array, sharpness: jax.Array) -> jax.Array:
        return self.decode(self.encode(x, scale, sharpness), scale, sharpness)

    def encode(self, x: jax.Array, scale: jax.Array, sharpness: jax.Array) -> jax.Array:
        x = jnp.clip(x / scale, 0.0, 1.0)
        y = 0.5 + jnp.tan(sharpness * (x - 0.5)) / (2 * jnp.tan(sharpness / 2))
        return round_ste((2**self.bits - 1) * y)

    def decode(self, u: jax.Array, scale: jax.Array, sharpness: jax.Array) -> jax.Array:
        y = 2 * u / (2**self.bits - 1) - 1
        return scale * (0.5 + jnp.arctan(y * jnp.tan(sharpness / 2)) / sharpness)


@dataclasses.dataclass(frozen=True)
class Arctan(SymmetricTan):
    """Codes that are dense near 0 alone: y = arctan(a x) / arctan(a), for any a above 0."""

    def encode(self, x: jax.Array, scale: jax.Array, sharpness: jax.Array) -> jax.Array:
        x = jnp.clip(x / scale, 0.0, 1.0)
        return round_ste((2**self.bits - 1) * jnp.arctan(sharpness * x) / jnp.arctan(sharpness))

    def decode(self, u: jax.Array, scale: jax.Array, sharpness: jax.Array) -> jax.Array:
        y = u / (2**self.bits - 1) * jnp.arctan(sharpness)
        return scale * jnp.tan(y) / sharpness


@dataclasses.dataclass(frozen=True)
class EitherTan:
    """`Arctan` where the state's `arctan` is 1, else `SymmetricTan`: one of them by tensor."""

    bits: int

    @property
    def state(self) -> dict[str, float]:
        return {**SymmetricTan(self.bits).state, "arctan": 0.0}

    def __call__(
        self, x: jax.Array, scale: jax.Array, sharpness: jax.Array, arctan: jax.Array
    ) -> jax.Array:
        # What is not chosen must not be infinite, for its gradient would be NaN.
        symmetric = SymmetricTan(self.bits)(x, scale, jnp.minimum(sharpness, STEEPEST))
        return jnp.where(arctan > 0.5, Arctan(self.bits)(x, scale, sharpness), symmetric)


FORMS: Mapping[str, Callable[[int], Any]] = {
    "sym": SymmetricTan,
    "atan": Arctan,
    "auto": EitherTan,
}
SHARPNESS = {
    SymmetricTan: jnp.linspace(0.1, 3.0, 32),
    Arctan: jnp.geomspace(0.2, 64.0, 32),
}


def table(quantizer: SymmetricTan, scale: float, sharpness: float) -> jax.Array:
    """The 2^bits values of a deployed quantiser, by code."""
    check_sharpness(quantizer, sharpness)
    return quantizer.decode(jnp.arange(2.0**quantizer.bits), scale, sharpness)  # type: ignore[arg-type]


def check_sharpness(quantizer: SymmetricTan, sharpness: float) -> None:
    """Refuse a sharpness at which there is no quantiser.

    Raises:
        ConfigError: naming it.
    """
    most = math.inf if isinstance(quantizer, Arctan) else STEEPEST
    if not 0 < sharpness <= most:
        raise ConfigError(f"sharpness={sharpness}: must be above 0 and at most {most:.4g}")


def search_tan(
    quantizer: Any, p_BxHxLxS: jax.Array, v_hat_BxHxSxK: jax.Array, v_BxHxSxK: jax.Array
) -> State:
    """Clip scale and sharpness with the least error of Q(A) V^ against A V.

    Ten scales from the 99th percentile of A to its largest value, and 32 sharpnesses.

    Raises:
        ConfigError: A is not made of probabilities.
    """
    low, high = float(p_BxHxLxS.min()), float(p_BxHxLxS.max())
    if low < 0 or high > 1 + 1e-3:
        raise ConfigError(f"probabilities: lie in [{low:.4g}, {high:.4g}]; must be in [0, 1]")
    if isinstance(quantizer, EitherTan):
        found = [
            _search(form(quantizer.bits), p_BxHxLxS, v_hat_BxHxSxK, v_BxHxSxK)
            for form in (SymmetricTan, Arctan)
        ]
        better = found[1][1] < found[0][1]
        state = {k: jnp.where(better, found[1][0][k], x) for k, x in found[0][0].items()}
        return {**state, "arctan": better.astype(jnp.float32)}
    return _search(quantizer, p_BxHxLxS, v_hat_BxHxSxK, v_BxHxSxK)[0]


@jax.jit
def _grid(p: jax.Array, sharpness: jax.Array) -> dict[str, jax.Array]:
    scales = jnp.linspace(jnp.quantile(p, 0.99), p.max(), 10)
    scales = jnp.maximum(scales, 1e-6)
    return {
        "scale": jnp.repeat(scales, len(sharpness)),
        "sharpness": jnp.tile(sharpness, len(scales)),
    }


def _search(quantizer: SymmetricTan, p: Any, v_hat: Any, v: Any) -> tuple[State, jax.Array]:
    grid = _grid(p, SHARPNESS[type(quantizer)])
    return _best(quantizer, grid, p, v_hat, v)


def _best_of(
    quantizer: SymmetricTan, grid: dict[str, jax.Array], p: Any, v_hat: Any, v: Any
) -> tuple[State, jax.Array]:
    rows = row_errors(p, v_hat, v)
    errors = each(lambda state: rows(quantizer(p, **state)).sum(), grid)
    return {name: x[0] for name, x in least(grid, errors, 1).items()}, errors.min()


_best = jax.jit(_best_of, static_argnums=0)

# ----------------------------------------------------------------------------------- MOSF


def medoid(x_C: jax.Array) -> jax.Array:
    """The element with the least mean absolute distance to all: MAD-guided, the third version."""
    return x_C[jnp.abs(x_C[:, None] - x_C).mean(0).argmin()]


STATISTICS: Mapping[str, Callable[[jax.Array], jax.Array]] = {
    "mean": jnp.mean,
    "median": jnp.median,
    "mad": medoid,
}
CANDIDATES = 32  # quantiles of the channels' scales, of the statistic "search"


class DopQ(RepQ):
    """RepQ-ViT with a robust statistic of the channels, and TanQ of the probabilities.

    `statistic` is one of `STATISTICS` or "search": the quantile of the channels' scales, of 32,
    with the least output error, and the median of their zero points.

    Raises:
        ConfigError: no such statistic.
    """

    def __init__(self, params: Any, statistic: str = "median", refit: bool = False) -> None:
        if statistic not in (*STATISTICS, "search"):
            allowed = ", ".join((*STATISTICS, "search"))
            raise ConfigError(f"model.statistic={statistic!r}: must be one of {allowed}")
        super().__init__(params, STATISTICS.get(statistic, jnp.median), refit)
        self.searches = statistic == "search"

    def shared(self, channels: State, layer: Linear) -> State:
        found = super().shared(channels, layer)
        if not self.searches:
            return found
        quantizer = layer.quantizer("input")
        scale = _searched(
            quantizer, channels["scale"], channels["zero"], layer.x_NxI, layer.kernel_IxO
        )
        return {**found, "scale": scale}

    def mix(self, product: Product) -> Mapping[str, State]:
        found = super().mix(product)
        v = product.right.swapaxes(1, 2)
        v_hat = product.quantizer("value")(v, **found["value"])
        quantizer = product.quantizer("probabilities")
        return {**found, "probabilities": search_tan(quantizer, product.left, v_hat, v)}

    def probabilities(self, product: Product) -> State:
        return {}  # found with the values


def _searched_of(
    quantizer: Uniform, scale_I: Any, zero_I: Any, x_NxI: Any, kernel_IxO: Any
) -> jax.Array:
    zero = jnp.median(zero_I)
    float_y = x_NxI @ kernel_IxO

    def error(state: dict[str, jax.Array]) -> jax.Array:
        change = collapse(scale_I, zero_I, state["scale"], zero)
        x = quantizer(x_NxI / change.factor_I - change.shift_I, state["scale"], zero)
        # W' x' is W x plus what the new bias takes away again.
        y = (x + change.shift_I) @ (kernel_IxO * change.factor_I[:, None])
        return jnp.square(y - float_y).sum()

    grid = {"scale": jnp.quantile(scale_I, jnp.linspace(0, 1, CANDIDATES))}
    return least(grid, each(error, grid), 1)["scale"][0]


_searched = jax.jit(_searched_of, static_argnums=0)


def rules(weights: int, activations: int, form: str = "sym") -> Quantized:
    """What is quantised: everything uniformly, but probabilities by TanQ of a `form`.

    Raises:
        ConfigError: no such form.
    """
    if form not in FORMS:
        raise ConfigError(f"model.form={form!r}: must be one of {', '.join(FORMS)}")
    check_bits(weights, 2)
    return uniform_rules(weights, activations, FORMS[form](activations))
