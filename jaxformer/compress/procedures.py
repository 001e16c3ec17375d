"""Calibration procedures that others are measured against, and built on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxformer.compress import observers
from jaxformer.compress.quantized import Quantized, Rule
from jaxformer.compress.quantizers import Log, Uniform
from jaxformer.compress.reparameterize import collapse, linear_parameters, reparameterized
from jaxformer.compress.walk import Linear, Product

State = Mapping[str, jax.Array]


def uniform_rules(weights: int, activations: int, probabilities: Any = None) -> Quantized:
    """Every linear map and product uniformly: kernels by output channel, all else by tensor.

    `probabilities` is another quantiser for those of attention.
    """
    uniform = Uniform(activations)
    return Quantized(
        (
            Rule(r"embed/projection/input$", Uniform(8)),
            Rule(r"/kernel$", Uniform(weights), per="channel"),
            Rule(r"/probabilities$", probabilities or uniform),
            Rule(r"/(input|query|key|value)$", uniform),
        )
    )


class MinMax:
    """Ranges as they are: what no outlier may spoil."""

    passes, passes_on = 1, "float"

    def __init__(self, params: Any) -> None:
        self.params = params

    def linear(self, layer: Linear) -> Mapping[str, State]:
        return {
            "input": observers.min_max(layer.quantizer("input").bits, layer.x_NxI, None),
            "kernel": observers.min_max(layer.quantizer("kernel").bits, layer.kernel_IxO, (0,)),
        }

    def scores(self, product: Product) -> Mapping[str, State]:
        return self._both(product, "query", "key")

    def mix(self, product: Product) -> Mapping[str, State]:
        return self._both(product, "probabilities", "value")

    def _both(self, product: Product, left: str, right: str) -> Mapping[str, State]:
        return {
            name: observers.min_max(product.quantizer(name).bits, x, None)
            for name, x in ((left, product.left), (right, product.right))
        }


_percentile = jax.jit(observers.percentile, static_argnums=(0, 2))
_percentile_log = jax.jit(observers.percentile_log, static_argnums=0)


class RepQ:
    """RepQ-ViT (arXiv 2212.08254): percentiles, and channels that share a scale after surgery.

    The channels of a norm's output are calibrated each by itself; `statistic` makes one scale and
    one zero point of theirs, and the norm and the maps that read it change accordingly. Kernels are
    calibrated after that; with `refit` so are the inputs, as one tensor.
    """

    passes, passes_on = 1, "float"

    def __init__(
        self,
        params: Any,
        statistic: Callable[[jax.Array], jax.Array] = jnp.mean,
        refit: bool = False,
    ) -> None:
        self.params, self.statistic, self.refit = params, statistic, refit

    def linear(self, layer: Linear) -> Mapping[str, State]:
        bits, x, kernel = layer.quantizer("input").bits, layer.x_NxI, layer.kernel_IxO
        if layer.norm:
            channels = {k: jnp.ravel(v) for k, v in _percentile(bits, x, (0,)).items()}
            given = self.shared(channels, layer)
            change = collapse(channels["scale"], channels["zero"], given["scale"], given["zero"])
            self.params = reparameterized(self.params, layer.norm, layer.paths, change)
            kernel = linear_parameters({"kernel": kernel}, change)["kernel"]
            if self.refit:
                given = _percentile(bits, x / change.factor_I - change.shift_I, None)
        else:
            given = _percentile(bits, x, None)
        return {"input": given, "kernel": _percentile(layer.quantizer("kernel").bits, kernel, (0,))}

    def shared(self, channels: State, layer: Linear) -> State:
        """One scale and zero point for all channels of an input, given those of each, (I,)."""
        return {name: self.statistic(value) for name, value in channels.items()}

    def scores(self, product: Product) -> Mapping[str, State]:
        return {
            name: _percentile(product.quantizer(name).bits, x, None)
            for name, x in (("query", product.left), ("key", product.right))
        }

    def mix(self, product: Product) -> Mapping[str, State]:
        value = _percentile(product.quantizer("value").bits, product.right, None)
        return {"probabilities": self.probabilities(product), "value": value}

    def probabilities(self, product: Product) -> State:
        """The state of the quantiser of P, which is `Log`."""
        return _percentile_log(product.quantizer("probabilities"), product.left)


def repq_rules(weights: int, activations: int) -> Quantized:
    """What RepQ-ViT quantises: probabilities by log sqrt(2)."""
    return uniform_rules(weights, activations, Log(activations, steps=2))
