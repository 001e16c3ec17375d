"""Calibration layer by layer: a model runs once, uncompiled, and every matrix product is seen.

Only the operands of one product are in memory at a time, and what a procedure compiles for one
layer serves all layers of its shapes; one program over all layers would hold every activation.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxformer.compress.quantized import Quantized, Rule, operands
from jaxformer.compress.reparameterize import norm_before
from jaxformer.errors import ConfigError
from jaxformer.nn.attention import Mix, Scores
from jaxformer.nn.einsum import Axes, Einsum
from jaxformer.nn.norm import Norm

Path = tuple[str, ...]
State = Mapping[str, jax.Array]
TOGETHER = ("query", "key", "value")  # maps of one input, quantised as one


@dataclasses.dataclass
class Linear:
    """A linear map x W + b, or several of one input side by side, as matrices.

    x (N, I) holds the rows of all examples. `norm` is where the norm lies whose output x is, if one
    lies before it which, as the maps, has a bias: both may change together (`reparameterize`).
    """

    paths: tuple[Path, ...]
    x_NxI: jax.Array
    kernel_IxO: jax.Array
    bias_O: jax.Array
    rules: Mapping[str, Rule | None]
    norm: Path | None = None

    @property
    def name(self) -> str:
        return "/".join(self.paths[0])

    def quantizer(self, operand: str) -> Any:
        """That of an operand; all that are searched have one."""
        rule = self.rules[operand]
        if rule is None:
            raise ConfigError(f"{self.name}/{operand}: no rule quantises it, but its partner")
        return rule.quantizer

    @property
    def y_NxO(self) -> jax.Array:
        return self.x_NxI @ self.kernel_IxO + self.bias_O


@dataclasses.dataclass
class Product:
    """Scores Q K^T, by (B, L, H, K) and (B, S, H, K), or P V, by (B, H, L, S) and (B, S, H, K)."""

    path: Path
    left: jax.Array
    right: jax.Array
    rules: Mapping[str, Rule | None]

    @property
    def name(self) -> str:
        return "/".join(self.path)

    def quantizer(self, operand: str) -> Any:
        """That of an operand; all that are searched have one."""
        rule = self.rules[operand]
        if rule is None:
            raise ConfigError(f"{self.name}/{operand}: no rule quantises it, but its partner")
        return rule.quantizer


class Procedure(Protocol):
    """What is found at each product: {operand: state}, in the shapes of its matrices.

    A state has one number, or one for each column of a kernel or input, or for each head.
    `passes_on` says what later layers see: "float" or "quantized" results.
    """

    passes_on: str

    def linear(self, layer: Linear) -> Mapping[str, State]: ...

    def scores(self, product: Product) -> Mapping[str, State]: ...

    def mix(self, product: Product) -> Mapping[str, State]: ...


def walk(
    run: Callable[[], Any],
    params: Any,
    rules: Quantized,
    procedure: Procedure,
    told: Callable[[str], object] = lambda name: None,
) -> dict[str, Any]:
    """Let `run` apply a model with `params`; the states of what `rules` quantise, by module path.

    Raises:
        ConfigError: a model whose layers are a loop, or attention to another sequence.
    """
    seen = _Seen(params, rules, procedure, told)
    with nn.intercept_methods(seen):
        run()
    return seen.states


class _Seen:
    """The interceptor of a walk."""

    def __init__(
        self, params: Any, rules: Quantized, procedure: Procedure, told: Callable[[str], object]
    ) -> None:
        self.params, self.rules, self.procedure, self.told = params, rules, procedure, told
        self.states: dict[str, Any] = {}
        self.shared: dict[Path, jax.Array] = {}
        self.rows: dict[Path, int] = {}  # that norms have handed on

    def __call__(self, method: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        names = operands(context)
        module = context.module
        if isinstance(module, Norm) and context.method_name == "__call__":
            y = method(*args, **kwargs)
            self.rows[tuple(module.path)] = math.prod(y.shape[:-1])
            return y
        ruled = {name: self.rules.rule(module, name) for name in names}
        if not any(ruled.values()):
            return method(*args, **kwargs)
        if any(isinstance(x, jax.core.Tracer) for x in args[: len(names)]):
            raise ConfigError(
                f"{'/'.join(module.path)}: cannot be calibrated inside a loop over layers; set "
                "model.scan=False"
            )
        path = tuple(module.path)
        if isinstance(module, Einsum):
            self._linear(path, module, ruled, *args)
        else:
            self._product(path, module, ruled, args)
        if self.procedure.passes_on == "quantized":
            node = self._node(path)
            args = list(args)
            for i, name in enumerate(names):
                if ruled[name] is not None:
                    args[i] = ruled[name].quantizer(args[i], **node[name])
        return method(*args, **kwargs)

    def _node(self, path: Path) -> dict[str, Any]:
        node = self.states
        for name in path:
            node = node.setdefault(name, {})
        return node

    def _write(self, path: Path, module: Any, found: Mapping[str, State], arrays: Any) -> None:
        node = self._node(path)
        for operand, state in found.items():
            rule = self.rules.rule(module, operand)
            if rule is None:
                continue
            missing = set(rule.quantizer.state) - set(state)  # type: ignore[union-attr]
            assert not missing, f"{'/'.join(path)}/{operand}: no {sorted(missing)} was found"
            shapes = {name: rule.shape(operand, module, arrays[operand], name) for name in state}
            node[operand] = {name: jnp.reshape(x, shapes[name]) for name, x in state.items()}

    def _linear(
        self, path: Path, module: Einsum, ruled: Any, x: Any, kernel: Any, bias: Any
    ) -> None:
        if path in self.shared:
            if not np.array_equal(self.shared.pop(path), x):
                raise ConfigError(
                    f"{'/'.join(path)}: does not read what the queries read; attention to another "
                    "sequence cannot be calibrated"
                )
            return
        self.told("/".join(path))
        axes = Axes.of(module.equation)
        inside = [i for i, axis in enumerate(axes.kernel) if axis not in axes.out]
        if inside != list(range(len(inside))) or axes.x != axes.kernel[: len(inside)]:
            raise ConfigError(f"{'/'.join(path)}: {module.equation!r} is no plain linear map")
        width = math.prod(kernel.shape[: len(inside)])
        paths = [path]
        if path[-1] == TOGETHER[0]:
            paths = [(*path[:-1], name) for name in TOGETHER]
            self.shared |= dict.fromkeys(paths[1:], x)
        weights = [self._params(p) for p in paths]
        kernels = [w["kernel"].reshape(width, -1) for w in weights]
        biases = [
            jnp.ravel(w["bias"]) if "bias" in w else jnp.zeros(k.shape[1])
            for w, k in zip(weights, kernels, strict=True)
        ]
        x_NxI = jnp.reshape(x, (-1, width)).astype(jnp.float32)
        layer = Linear(
            tuple(paths),
            x_NxI,
            jnp.concatenate(kernels, 1),
            jnp.concatenate(biases),
            ruled,
            self._norm(path, len(x_NxI)) if all("bias" in w for w in weights) else None,
        )
        found = self.procedure.linear(layer)
        ends = np.cumsum([0, *(k.shape[1] for k in kernels)])
        for p, w, start, end in zip(paths, weights, ends[:-1], ends[1:], strict=True):
            own = dict(found)
            if "kernel" in found:
                own["kernel"] = {
                    name: value if jnp.size(value) == 1 else jnp.ravel(value)[start:end]
                    for name, value in found["kernel"].items()
                }
            self._write(p, _At(p, module.equation), own, {"input": x, "kernel": w["kernel"]})

    def _norm(self, path: Path, rows: int) -> Path | None:
        """The norm whose output, all of it and nothing else, is read at a path.

        Windows that do not divide their grid read zeros beside it, which surgery would not move.
        """
        norm = norm_before(path)
        if norm is None or self.rows.get(norm) != rows:
            return None
        return norm if {"scale", "bias"} <= set(self._params(norm)) else None

    def _params(self, path: Path) -> Mapping[str, Any]:
        node = self.params
        for name in path:
            node = node[name]
        return node

    def _product(self, path: Path, module: Scores | Mix, ruled: Any, args: Any) -> None:
        self.told("/".join(path))
        left, right = (jnp.asarray(x, jnp.float32) for x in args[:2])
        product = Product(path, left, right, ruled)
        search = self.procedure.scores if isinstance(module, Scores) else self.procedure.mix
        self._write(path, module, search(product), dict(zip(ruled, (left, right), strict=True)))


@dataclasses.dataclass(frozen=True)
class _At:
    """As much of a module as `Rule` asks for."""

    path: Path
    equation: str
