"""NoisyQuant: a fixed noise before quantisation, taken back after it, that lowers rounding errors.

Symbols of the paper: x the input of a linear map with weights W and bias B, n the noise (C,),
k bits, s the scale of the activations' quantiser.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxformer.compress.observers import symmetric_max
from jaxformer.compress.quantized import Quantized, Rule
from jaxformer.compress.quantizers import Quantizer, Symmetric
from jaxformer.compress.search import each, row_errors
from jaxformer.compress.walk import Linear, Product
from jaxformer.errors import ConfigError

State = Mapping[str, jax.Array]
CLIPS, SHIFTS, AMPLITUDES = 1000, 200, 2000  # candidates: of clips, of shifts to a side, of noise


@dataclasses.dataclass(frozen=True)
class Noisy:
    """q(x + n) - n for any quantiser q: one vector for all tokens and images (section 3.3)."""

    inner: Quantizer

    @property
    def bits(self) -> int:
        return self.inner.bits

    @property
    def state(self) -> dict[str, float]:
        return {**self.inner.state, "noise": 0.0}

    def __call__(self, x: jax.Array, noise: jax.Array, **state: Any) -> jax.Array:
        if noise.shape[-1] not in (1, x.shape[-1]):
            raise ConfigError(
                f"noise of {noise.shape[-1]} channels: the input has {x.shape[-1]}, one for each"
            )
        return self.inner(x + noise, **state) - noise


def folded_bias(bias_O: jax.Array, kernel_IxO: jax.Array, noise_I: jax.Array) -> jax.Array:
    """B' = B - n W: the bias with which q(x + n) needs nothing taken back. W is the quantised."""
    return bias_O - noise_I @ kernel_IxO


def rules(weights: int, activations: int) -> Quantized:
    """What is quantised: the maps of attention and MLP, and those that merge patches.

    The patches' own embedding, the head and products of attention stay as they are.
    """
    quantizer = Noisy(Symmetric(activations))
    inside = r"(mixer/(query|key|value|out)|mlp/(up|down)|merge_\d+/reduction)"
    return Quantized(
        (
            Rule(rf"{inside}/kernel$", Symmetric(weights), per="channel"),
            Rule(rf"{inside}/input$", quantizer, but=(("noise", "channel"),)),
        )
    )


# ------------------------------------------------------------------------------- searches


class Found(NamedTuple):
    """What a search chose: the value, its place among the candidates, and all their losses."""

    value: jax.Array
    index: jax.Array
    losses: jax.Array


def _first_least(values: jax.Array, losses: jax.Array) -> Found:
    index = losses.argmin()
    return Found(values[index], index, losses)


def clip_search(
    x_NxI: jax.Array, kernel_IxO: jax.Array, quantizer: Symmetric, count: int = CLIPS
) -> Found:
    """The scale whose clip, i / count of max |x|, loses least in the output; the largest first.

    The kernel is quantised already, on both sides: its own error is not the activations'.
    """
    clips = jnp.abs(x_NxI).max() / count * jnp.arange(count, 0, -1)
    rows = row_errors(x_NxI, kernel_IxO, kernel_IxO)

    def loss(state: State) -> jax.Array:
        clip = state["clip"]
        x_hat = quantizer(jnp.clip(x_NxI, -clip, clip), clip / quantizer.most)
        return rows(x_hat).sum() / (len(x_NxI) * kernel_IxO.shape[1])

    found = _first_least(clips, each(loss, {"clip": clips}))
    return found._replace(value=found.value / quantizer.most)


def noise_search(
    x_NxI: jax.Array,
    kernel_IxO: jax.Array,
    quantizer: Quantizer,
    state: State,
    candidates: Callable[[jax.Array], jax.Array],
    at: jax.Array,
) -> Found:
    """Of noises `candidates(a)`, (I,) or one number, for every a of `at`, that of least loss."""
    rows = row_errors(x_NxI, kernel_IxO, kernel_IxO)

    def loss(candidate: State) -> jax.Array:
        noise = candidates(candidate["at"])
        return rows(Noisy(quantizer)(x_NxI, jnp.atleast_1d(noise), **state)).sum()

    return _first_least(at, each(loss, {"at": at}))


def shift_search(
    x_NxI: jax.Array, kernel_IxO: jax.Array, quantizer: Quantizer, state: State
) -> Found:
    """A number added to all channels, from -1 to 1 steps; 0 unless another is better."""
    places = jnp.arange(-SHIFTS, SHIFTS)
    shifts = state["scale"] * places / SHIFTS
    found = noise_search(x_NxI, kernel_IxO, quantizer, state, lambda a: a, shifts)
    still = found.losses[SHIFTS] <= found.losses[found.index]
    return found._replace(
        value=jnp.where(still, 0.0, found.value), index=jnp.where(still, SHIFTS, found.index)
    )


def amplitude_search(
    x_NxI: jax.Array,
    kernel_IxO: jax.Array,
    quantizer: Quantizer,
    state: State,
    shift: jax.Array,
    draw_I: jax.Array,
) -> Found:
    """How much of a draw's noise, from none to two steps, is added to the shift; its value is n."""
    parts = jnp.arange(AMPLITUDES)

    def noise(part: jax.Array) -> jax.Array:
        return shift + draw_I * state["scale"] * part / 1000

    found = noise_search(x_NxI, kernel_IxO, quantizer, state, noise, parts)
    return found._replace(value=noise(found.value))


_clip = jax.jit(clip_search, static_argnums=(2, 3))
_shift = jax.jit(shift_search, static_argnums=2)
_amplitude = jax.jit(amplitude_search, static_argnums=2)


class NoisyQuant:
    """Two walks: clips of all layers, each on quantised inputs; then shifts and noises alike.

    `shift` and `noise` say which of the two are searched: neither is the plain quantiser,
    EasyQuant's. A layer's draw is uniform on [-1, 1], by `seed` and the layer's name.
    """

    passes, passes_on = 2, "quantized"

    def __init__(self, params: Any, shift: bool = True, noise: bool = True, seed: int = 0) -> None:
        self.params, self.with_shift, self.with_noise, self.seed = params, shift, noise, seed
        self.scales: dict[str, jax.Array] = {}

    def linear(self, layer: Linear) -> Mapping[str, State]:
        weigher, quantizer = layer.quantizer("kernel"), layer.quantizer("input").inner
        of_kernel = symmetric_max(weigher.bits, layer.kernel_IxO, (0,))
        kernel = weigher(layer.kernel_IxO, **of_kernel)
        channels = layer.x_NxI.shape[1]
        if layer.name not in self.scales:
            self.scales[layer.name] = _clip(layer.x_NxI, kernel, quantizer).value
            noise = jnp.zeros(channels)
        else:
            noise = self.noise(layer, kernel, quantizer)
        given = {"scale": self.scales[layer.name], "noise": noise}
        return {"input": given, "kernel": of_kernel}

    def noise(self, layer: Linear, kernel: jax.Array, quantizer: Quantizer) -> jax.Array:
        """N (I,) of a layer whose scale is known."""
        state, shift = {"scale": self.scales[layer.name]}, jnp.zeros(())
        if self.with_shift:
            shift = _shift(layer.x_NxI, kernel, quantizer, state).value
        if not self.with_noise:
            return jnp.full(layer.x_NxI.shape[1], shift)
        draw = uniform_draw(self.seed, layer.name, layer.x_NxI.shape[1])
        return _amplitude(layer.x_NxI, kernel, quantizer, state, shift, draw).value

    def scores(self, product: Product) -> Mapping[str, State]:
        raise ConfigError(
            f"{product.name}: NoisyQuant leaves the products of attention as they are"
        )

    mix = scores


def uniform_draw(seed: int, name: str, channels: int) -> jax.Array:
    """U (C,) on [-1, 1]: the same for the same seed and layer."""
    key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))
    return jax.random.uniform(key, (channels,), minval=-1.0, maxval=1.0)


# ---------------------------------------------------------------------------------- theory


def rounding_error(t: jax.Array, b: float) -> jax.Array:
    """E(t) = t - 2 b round(t / 2 b): of a quantiser with bins of width 2 b."""
    return t - 2 * b * jnp.round(t / (2 * b))


def expected_error(x: jax.Array, n: jax.Array, b: float) -> jax.Array:
    """E[e(x + N)^2] for N uniform on [-n, n], exactly: (F(x + n) - F(x - n)) / 2 n.

    F(t) = 2 b^3 / 3 round(t / 2 b) + e(t)^3 / 3 is the antiderivative of e^2. At n = b it is
    b^2 / 3 for every x, so that noise helps where |e(x)| > b / sqrt(3) (section 3.2).
    """

    def primitive(t: jax.Array) -> jax.Array:
        return 2 * b**3 / 3 * jnp.round(t / (2 * b)) + rounding_error(t, b) ** 3 / 3

    return (primitive(x + n) - primitive(x - n)) / (2 * n)
