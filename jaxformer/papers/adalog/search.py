"""FPCS: fast progressive combining search, and the order in which a layer's scales are found."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxformer.compress.observers import min_max
from jaxformer.compress.quantizers import Shifted, Uniform
from jaxformer.compress.reparameterize import collapse, linear_parameters, reparameterized
from jaxformer.compress.search import each, least, row_errors
from jaxformer.compress.walk import Linear, Product

State = dict[str, jax.Array]
Errors = Callable[[State], jax.Array]  # a state of (C,) arrays -> errors (C,)

CANDIDATES, BEAM, STEPS, ROUNDS = 128, 16, 6, 3
BASES = (10.0, 137.0)  # the first and last q that are tried
FINEST = 1e-4  # the least scale of activations
# An input's scale and zero point are told by the errors of so many rows, evenly apart, in so many
# random mixtures of the outputs. The 32 images of DeiT-S have 6304 rows, those of digits 544.
ROWS, MIXTURES = 1024, 64
# Of kernels every column has its own, told by all rows, through the Gram matrix of the inputs; if
# there are more inputs than these, by so many rows.
GRAM = 512


def some(x: jax.Array, axis: int = 0, each: int = 1) -> jax.Array:
    """At most `ROWS` rows of x along an axis, which counts `each` times."""
    step = -(-x.shape[axis] * each // ROWS)
    return jax.lax.slice_in_dim(x, 0, None, step, axis)


def mixed(kernel_IxO: jax.Array) -> jax.Array:
    """(I, M) mixtures of the columns, whose |E|^2 is that of all in the mean."""
    outputs = kernel_IxO.shape[1]
    if outputs <= MIXTURES:
        return kernel_IxO
    by = jax.random.normal(jax.random.key(0), (outputs, MIXTURES)) / MIXTURES**0.5
    return kernel_IxO @ by.astype(kernel_IxO.dtype)


# -------------------------------------------------------------------------- progressive search


def refine(
    errors: Errors, kept: State, spread: jax.Array, expansions: int, floor: float, best: Any
) -> State:
    """Narrow in on the survivors' scales, five times; the best state seen from `best` on."""
    width = len(kept["scale"])
    offsets = jnp.linspace(0, 1, expansions)[:, None] - 0.5

    def step(_: Any, carry: Any) -> Any:
        kept, best, spread = carry
        scales = kept["scale"][:, None] + spread * offsets  # (width, expansions, C)
        grown = {
            name: jnp.broadcast_to(value[:, None], scales.shape) for name, value in kept.items()
        }
        grown["scale"] = jnp.maximum(scales, floor)
        grown = {name: value.reshape(-1, value.shape[-1]) for name, value in grown.items()}
        return *select(errors, grown, width, best), spread / (expansions - 0.5)

    _, best, _ = jax.lax.fori_loop(0, STEPS - 1, step, (kept, best, spread))
    return best[0]


def select(errors: Errors, candidates: State, count: int, best: Any = None) -> tuple[State, Any]:
    """The survivors, and (state, errors) of the best that was ever seen."""
    found = each(errors, candidates)
    kept = least(candidates, found, count)
    first, error = {name: value[0] for name, value in kept.items()}, found.min(0)
    if best is None:
        return kept, (first, error)
    better = error < best[1]
    state = {name: jnp.where(better, value, best[0][name]) for name, value in first.items()}
    return kept, (state, jnp.where(better, error, best[1]))


def span(x: jax.Array, bits: int, axes: Any, floor: float) -> tuple[jax.Array, jax.Array]:
    """The least and largest scale of the grid: the values' inner 80 % and their whole range."""
    q = jnp.quantile(x, jnp.array([0.0, 0.1, 0.9, 1.0]), axis=axes)
    levels = 2**bits - 1
    low, high = (q[2] - q[1]) / levels, (q[3] - q[0]) / levels
    return jnp.atleast_1d(jnp.maximum(low, floor)), jnp.atleast_1d(jnp.maximum(high, floor))


def zeros_of(bits: int, of_input: bool) -> jax.Array:
    """The zero points that are tried: whole codes around the middle."""
    half = 2 ** (bits - 1)
    count = min(16, 2 * half if of_input else half)
    return jnp.arange(half - count // 2, half + count // 2, dtype=jnp.float32)


def fpcs(
    errors: Errors, low: jax.Array, high: jax.Array, zeros: jax.Array, floor: float = FINEST
) -> State:
    """Scale and zero point (C,) of least error, by a beam over a grid that narrows.

    Returns the best state of all that were tried, the grid's included.
    """
    count = CANDIDATES // len(zeros)
    scales = jnp.linspace(low, high, count)  # (count, C)
    shape = (len(zeros), *scales.shape)
    grid = {
        "scale": jnp.broadcast_to(scales, shape).reshape(-1, shape[-1]),
        "zero": jnp.broadcast_to(zeros[:, None, None], shape).reshape(-1, shape[-1]),
    }
    kept, best = select(errors, grid, BEAM)
    spread = (high - low) / max(count - 1, 1)
    return refine(errors, kept, spread, CANDIDATES // BEAM, floor, best)


def second_largest(low: jax.Array, high: jax.Array, zeros: jax.Array) -> State:
    """The state that a search begins with."""
    count = CANDIDATES // len(zeros)
    scale = jnp.linspace(low, high, count)[-2]
    return {"scale": scale, "zero": jnp.full_like(scale, zeros[len(zeros) // 2])}


def in_turns(
    turn: Callable[[dict[str, State]], dict[str, State]], start: dict[str, State]
) -> dict[str, State]:
    """What `turn` makes of the states of two operands, each given the other, `ROUNDS` times."""
    return jax.lax.fori_loop(0, ROUNDS, lambda _, found: turn(found), start)


# ------------------------------------------------------------------------------- linear maps


def by_values(quantizer: Any, x: jax.Array, axes: Any, of_input: bool, floor: float) -> State:
    """The state with the least squared error on the values themselves."""
    few = some(x) if of_input else x

    def errors(state: State) -> jax.Array:
        return jnp.atleast_1d(jnp.square(quantizer(few, **state) - few).mean(axes))

    return fpcs(
        errors, *span(x, quantizer.bits, axes, floor), zeros_of(quantizer.bits, of_input), floor
    )


def kernel_by_output(
    quantizer: Uniform, x_hat: jax.Array, x: jax.Array, kernel_IxO: jax.Array
) -> State:
    """The kernel's state (O,) with the least squared error of the outputs, by column."""
    if x.shape[1] > GRAM:
        step = -(-len(x) // GRAM)
        x_hat, x = x_hat[::step], x[::step]
    rows = row_errors(kernel_IxO.T, x_hat.T, x.T)

    def errors(state: State) -> jax.Array:
        return rows(quantizer(kernel_IxO, **state).T)

    ends = span(kernel_IxO, quantizer.bits, 0, 1e-8)
    return fpcs(errors, *ends, zeros_of(quantizer.bits, False), 1e-8)


@functools.partial(jax.jit, static_argnums=(0, 1))
def search_linear(
    weigher: Uniform, quantizer: Uniform, x_NxI: jax.Array, kernel_IxO: jax.Array
) -> dict[str, State]:
    """The states of a kernel and of a uniform input, each by the outputs, in turns."""
    ends, few = span(x_NxI, quantizer.bits, None, FINEST), some(x_NxI)

    def turn(found: dict[str, State]) -> dict[str, State]:
        x_hat = quantizer(x_NxI, **found["input"])
        kernel = kernel_by_output(weigher, x_hat, x_NxI, kernel_IxO)
        rows = row_errors(few, mixed(weigher(kernel_IxO, **kernel)), mixed(kernel_IxO))

        def errors(state: State) -> jax.Array:
            return rows(quantizer(few, **state)).sum()[None]

        return {"input": fpcs(errors, *ends, zeros_of(quantizer.bits, True)), "kernel": kernel}

    start = by_values(quantizer, x_NxI, None, True, FINEST)
    return in_turns(
        turn, {"input": start, "kernel": by_values(weigher, kernel_IxO, 0, False, 1e-8)}
    )


@functools.partial(jax.jit, static_argnums=(0, 1))
def search_pixels(
    weigher: Uniform, quantizer: Uniform, x_NxI: jax.Array, kernel_IxO: jax.Array
) -> dict[str, State]:
    """The states of a patch embedding: the range of its pixels, and its kernel's by the outputs.

    Pixels have 256 levels, which 8 bits keep. The search's zero points, near the middle, would
    clip those of images that are not centred.
    """
    given = min_max(quantizer.bits, x_NxI, None)
    kernel = kernel_by_output(weigher, quantizer(x_NxI, **given), x_NxI, kernel_IxO)
    return {"input": given, "kernel": kernel}


@functools.partial(jax.jit, static_argnums=(0, 1))
def search_log_linear(
    weigher: Uniform, quantizer: Shifted, x_NxI: jax.Array, kernel_IxO: jax.Array
) -> dict[str, State]:
    """The states of fc2: base and scale of its shifted logarithmic input, and its kernel's."""
    positive = jnp.where(x_NxI > 0, x_NxI, jnp.nan)
    ends, few = jnp.nanquantile(positive, jnp.array([0.9, 1.0])) + quantizer.shift, some(x_NxI)
    scales = jnp.linspace(ends[0], ends[1], 16)[:, None]  # (16, 1)
    bases = jnp.arange(BASES[0], BASES[1] + 1)[:, None]  # (128, 1)

    def turn(found: dict[str, State]) -> dict[str, State]:
        kernel_hat = weigher(kernel_IxO, **found["kernel"])
        rows = row_errors(few, mixed(kernel_hat), mixed(kernel_IxO))

        def errors(state: State) -> jax.Array:
            return rows(quantizer(few, **state)).sum()[None]

        scale = found["input"]["scale"]
        ranked = {"scale": jnp.broadcast_to(scale, bases.shape), "q": bases}
        kept, best = select(errors, ranked, 8)
        crossed = {
            "scale": jnp.tile(scales, (8, 1)),
            "q": jnp.repeat(kept["q"], 16, axis=0),
        }
        kept, best = select(errors, crossed, 32, best)
        spread = (ends[1] - ends[0]) / 15
        given = refine(errors, kept, spread, 4, FINEST, best)
        kernel = kernel_by_output(weigher, quantizer(x_NxI, **given), x_NxI, kernel_IxO)
        return {"input": given, "kernel": kernel}

    start = {"scale": scales[-2], "q": jnp.full((1,), 37.0)}
    return in_turns(
        turn, {"input": start, "kernel": by_values(weigher, kernel_IxO, 0, False, 1e-8)}
    )


@functools.partial(jax.jit, static_argnums=0)
def search_channels(quantizer: Uniform, x_NxI: jax.Array) -> State:
    """The state (I,) of an input whose channels have scales of their own."""
    return by_values(quantizer, x_NxI, 0, True, FINEST)


# --------------------------------------------------------------------- products of attention


def by_head(state: State) -> State:
    """(H,) beside (B, H, N, K)."""
    return {name: value[None, :, None, None] for name, value in state.items()}


def left_by_output(
    quantizer: Uniform, ends: Any, left: jax.Array, right: jax.Array, float_right: jax.Array
) -> State:
    """The state (H,) of the left operand (B, H, N, K) of a product, by its squared error."""
    rows = row_errors(left, right, float_right)

    def errors(state: State) -> jax.Array:
        return rows(quantizer(left, **by_head(state))).sum((0, 2))

    return fpcs(errors, *ends, zeros_of(quantizer.bits, False))


def ends_of(quantizer: Uniform, x_BxHxNxK: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The least and largest scale (H,) that are tried."""
    return span(x_BxHxNxK, quantizer.bits, (0, 2, 3), FINEST)


@functools.partial(jax.jit, static_argnums=(0, 1))
def search_scores(
    of_q: Uniform, of_k: Uniform, q_BxLxHxK: jax.Array, k_BxSxHxK: jax.Array
) -> dict[str, State]:
    """The states (H,) of queries and keys, by their products, in turns."""
    q, k = q_BxLxHxK.swapaxes(1, 2), k_BxSxHxK.swapaxes(1, 2)
    few_q, few_k = some(q, 2, len(q)), some(k, 2, len(k))
    of = {"query": (of_q, ends_of(of_q, q)), "key": (of_k, ends_of(of_k, k))}
    states = {
        name: second_largest(*ends, zeros_of(quantizer.bits, False))
        for name, (quantizer, ends) in of.items()
    }

    def turn(found: dict[str, State]) -> dict[str, State]:
        right = [x.swapaxes(2, 3) for x in (of_k(k, **by_head(found["key"])), k)]
        query = left_by_output(*of["query"], few_q, *right)
        right = [x.swapaxes(2, 3) for x in (of_q(q, **by_head(query)), q)]
        return {"query": query, "key": left_by_output(*of["key"], few_k, *right)}

    return in_turns(turn, states)


@functools.partial(jax.jit, static_argnums=(0, 1))
def search_mix(
    of_p: Any, of_v: Uniform, p_BxHxLxS: jax.Array, v_BxSxHxK: jax.Array
) -> dict[str, State]:
    """The base of probabilities, whose scale is 1, and the state (H,) of values, in turns."""
    v, p = v_BxSxHxK.swapaxes(1, 2), some(p_BxHxLxS, 2, len(p_BxHxLxS))
    ends = ends_of(of_v, v)
    bases = {"q": jnp.arange(BASES[0], BASES[1] + 1)[:, None]}

    def turn(found: dict[str, State]) -> dict[str, State]:
        rows = row_errors(p, of_v(v, **by_head(found["value"])), v)

        def errors(state: State) -> jax.Array:
            return rows(of_p(p, 1.0, state["q"])).sum()[None]

        base = least(bases, each(errors, bases), 1)["q"][0]
        turned = [x.swapaxes(2, 3) for x in (v, of_p(p, 1.0, base), p)]
        probabilities = {"scale": jnp.ones(1), "q": base}
        return {"probabilities": probabilities, "value": left_by_output(of_v, ends, *turned)}

    start = {"scale": jnp.ones(1), "q": bases["q"][0]}
    value = second_largest(*ends, zeros_of(of_v.bits, False))
    return in_turns(turn, {"probabilities": start, "value": value})


class AdaLogSearch:
    """The calibration of a whole model: every product against the float network's operands."""

    passes, passes_on = 1, "float"

    def __init__(self, params: Any) -> None:
        self.params = params

    def linear(self, layer: Linear) -> Mapping[str, State]:
        weigher, quantizer = layer.quantizer("kernel"), layer.quantizer("input")
        if isinstance(quantizer, Shifted):
            return search_log_linear(weigher, quantizer, layer.x_NxI, layer.kernel_IxO)
        if layer.paths[0][-2:] == ("embed", "projection"):
            return search_pixels(weigher, quantizer, layer.x_NxI, layer.kernel_IxO)
        x, kernel = layer.x_NxI, layer.kernel_IxO
        if layer.norm:
            channels = search_channels(quantizer, x)
            scale, zero = channels["scale"].mean(), jnp.round(channels["zero"].mean())
            change = collapse(channels["scale"], channels["zero"], scale, zero)
            self.params = reparameterized(self.params, layer.norm, layer.paths, change)
            x = x / change.factor_I - change.shift_I
            kernel = linear_parameters({"kernel": kernel}, change)["kernel"]
        return search_linear(weigher, quantizer, x, kernel)

    def scores(self, product: Product) -> Mapping[str, State]:
        quantizers = product.quantizer("query"), product.quantizer("key")
        return search_scores(*quantizers, product.left, product.right)

    def mix(self, product: Product) -> Mapping[str, State]:
        quantizers = product.quantizer("probabilities"), product.quantizer("value")
        return search_mix(*quantizers, product.left, product.right)
