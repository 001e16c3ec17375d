"""Interventions: what a prediction owes to a state of the stream, or to one attention weight.

A layer is a block of the model, from 0; a state is what a block reads, (B, L, D). The rest of the
model runs as it is, by its own code; what comes before an intervention is not run again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxformer.analyze.capture import BLOCKS, Edit, Run, Site, Values, capture, only, passed
from jaxformer.errors import ConfigError
from jaxformer.nn.attention import Mix

WEIGHTS = Site(kind=Mix, argument=0)  # attention weights (B, H, L, S), as they meet the values
EDGES = ("zero", "max")


def constant(site: Site, value: jax.Array) -> Edit:
    """`value` in place of what passes a site."""
    return Edit(site, lambda _: value)


def held(site: Site, values: Values) -> list[Edit]:
    """Every value of a site as it was in another run: attention of the unchanged input, say."""
    return [
        constant(site.exactly(path, i), value)
        for path, calls in values.items()
        for i, value in enumerate(calls)
    ]


def states(model: Any, variables: Any, *args: Any, **kwargs: Any) -> list[jax.Array]:
    """What each layer reads, and after them what the last one gives: depth + 1 states."""
    layers = passed(model, variables, *args, site=BLOCKS, **kwargs)
    sites = (*layers, after(layers[-1]))
    return [only(v) for v in capture(model, variables, *args, sites=sites, **kwargs).values]


def after(layer: Site) -> Site:
    """What comes out of the block that a layer reads for."""
    return Site(layer.pattern, layer.kind, None, layer.method, layer.call)


def logit_lens(model: Any, variables: Any, *args: Any, **kwargs: Any) -> jax.Array:
    """The output (depth + 1, ...) if the stream went from each state straight to the head.

    The model's own last norm and head read it (nostalgebraist 2020, "interpreting GPT: the logit
    lens"). The last row is the output itself.
    """
    layers = passed(model, variables, *args, site=BLOCKS, **kwargs)
    stream = jnp.stack(states(model, variables, *args, **kwargs))

    def read(state: jax.Array) -> Any:
        edits = [constant(after(layers[-1]), state)]
        return capture(model, variables, *args, edits=edits, **kwargs).output

    return jax.vmap(read)(stream)


def rank(logits: jax.Array, target: jax.Array) -> jax.Array:
    """How many of logits (..., V) are above that of `target` (...): 0 is the prediction."""
    own = jnp.take_along_axis(logits, target[..., None], -1)
    return (logits > own).sum(-1)


def run_from(
    model: Any,
    variables: Any,
    *args: Any,
    layer: int,
    state: jax.Array,
    sites: Sequence[Site] = (),
    edits: Sequence[Edit] = (),
    **kwargs: Any,
) -> Run:
    """The rest of the model from `state` at `layer` on.

    Raises:
        ConfigError: there is no such layer.
    """
    layers = passed(model, variables, *args, site=BLOCKS, **kwargs)
    check_layer(layer, len(layers))
    edits = (constant(layers[layer], state), *edits)
    return capture(model, variables, *args, sites=sites, edits=edits, **kwargs)


def check_layer(layer: int, depth: int) -> None:
    """Raise a `ConfigError` for a layer that is not there."""
    if not 0 <= layer < depth:
        raise ConfigError(f"layer={layer}: the model has layers 0 to {depth - 1}")


def causal_trace(
    model: Any,
    variables: Any,
    inputs: jax.Array,
    perturbed: jax.Array,
    *,
    positions: Sequence[Sequence[int]],
    measure: Callable[[Any], jax.Array],
    layers: Sequence[int] | None = None,
    **kwargs: Any,
) -> jax.Array:
    """`measure` of the outputs when states are those of `perturbed`: (layers, positions, ...).

    Of the run on `inputs` the state at each layer is replaced at each set of `positions`, one at a
    time, by that of the run on `perturbed` inputs, and the rest is computed again (Vig et al. 2020,
    arXiv 2004.12265; Meng et al. 2022, arXiv 2202.05262).

    Raises:
        ConfigError: there is no such layer or position.
    """
    own, other = (states(model, variables, x, **kwargs) for x in (inputs, perturbed))
    length = own[0].shape[1]
    for position in (p for some in positions for p in some):
        if not 0 <= position < length:
            raise ConfigError(f"positions: {position} is not one of 0 to {length - 1}")
    chosen = range(len(own) - 1) if layers is None else layers
    swapped = jnp.stack([jnp.isin(jnp.arange(length), jnp.array(some)) for some in positions])
    found = []
    for layer in chosen:
        check_layer(layer, len(own) - 1)

        def one(at_L: jax.Array, layer: int = layer) -> jax.Array:
            state = jnp.where(at_L[None, :, None], other[layer], own[layer])
            return measure(
                run_from(model, variables, inputs, layer=layer, state=state, **kwargs).output
            )

        found.append(jax.vmap(one)(swapped))
    return jnp.stack(found)


def weights_of(layers: Sequence[Site], layer: int) -> Site:
    """The attention weights of one layer."""
    block = layers[layer]
    pattern = block.pattern.removesuffix("$") + "/"
    return Site(pattern, WEIGHTS.kind, WEIGHTS.argument, WEIGHTS.method, block.call)


def edge_effects(
    model: Any,
    variables: Any,
    *args: Any,
    layer: int,
    to: str,
    measure: Callable[[Run], Any],
    sites: Sequence[Site] = (),
    edges: jax.Array | None = None,
    batch_size: int = 128,
    **kwargs: Any,
) -> Any:
    """`measure` of the run in which one attention weight of `layer` is another: (edges, ...).

    A weight P[h, i, j] becomes 0 (`to` "zero") or the largest that any query gives key j
    ("max"), all other weights of the layer stay, without renormalisation, and later layers run on
    what follows from it. `edges` (E, 3) are rows of (h, i, j), all of them by default in the order
    of P; `batch_size` run at once. The inputs are one example, in a batch of one.

    Raises:
        ConfigError: no such layer, or attention that is fused.
    """
    if to not in EDGES:
        raise ConfigError(f"to={to!r}: must be one of {', '.join(EDGES)}")
    layers = passed(model, variables, *args, site=BLOCKS, **kwargs)
    check_layer(layer, len(layers))
    here = weights_of(layers, layer)
    before = capture(model, variables, *args, sites=(layers[layer], here), **kwargs)
    state, p_1xHxLxS = only(before.values[0]), only(before.values[1])
    if p_1xHxLxS.shape[0] != 1:
        raise ConfigError(f"a batch of {p_1xHxLxS.shape[0]}: edges are those of one example")
    new = jnp.zeros(()) if to == "zero" else p_1xHxLxS[0].max(1)  # (H, S)
    if edges is None:
        edges = jnp.stack(jnp.unravel_index(jnp.arange(p_1xHxLxS.size), p_1xHxLxS.shape[1:]), -1)

    def one(edge: jax.Array) -> Any:
        h, i, j = edge
        value = new if to == "zero" else new[h, j]
        edits = [constant(here, p_1xHxLxS.at[0, h, i, j].set(value))]
        return measure(
            run_from(
                model,
                variables,
                *args,
                layer=layer,
                state=state,
                sites=sites,
                edits=edits,
                **kwargs,
            )
        )

    return jax.lax.map(one, edges, batch_size=min(batch_size, len(edges)))
