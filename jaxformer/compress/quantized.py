"""Where a model is quantised: an interceptor of the operands of its matrix products.

Operands have names: "<module>/input" and "<module>/kernel" of every `Einsum`, and of attention that
is `Unfused` ".../scores/query", ".../scores/key", ".../mix/probabilities", ".../mix/value".
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxformer.compress.quantizers import Quantizer, smooth
from jaxformer.errors import ConfigError
from jaxformer.nn.attention import Mix, Scores
from jaxformer.nn.einsum import Axes, Einsum

COLLECTION = "quantizers"  # of a state's `extra`: the scales of every operand, at its module's path

OPERANDS: Mapping[tuple[type, str], tuple[str, ...]] = {
    (Einsum, "contract"): ("input", "kernel"),
    (Scores, "__call__"): ("query", "key"),
    (Mix, "__call__"): ("probabilities", "value"),
}


def operands(context: Any) -> tuple[str, ...]:
    """The names of a method's first arguments, none if it is no matrix product."""
    for (cls, method), names in OPERANDS.items():
        if isinstance(context.module, cls) and context.method_name == method:
            return names
    return ()


Per = Literal["tensor", "channel", "head"]


@dataclasses.dataclass(frozen=True)
class Rule:
    """Operands whose name the regex `where` finds are quantised, by None not.

    `per` says what has a state of its own: nothing, the features of an input or the outputs of a
    kernel ("channel"), or the heads of an operand of attention ("head"). `but` names arrays of the
    state that are by other things.
    """

    where: str
    quantizer: Quantizer | None
    per: Per = "tensor"
    but: tuple[tuple[str, Per], ...] = ()

    def shape(self, operand: str, module: Any, x: jax.Array, name: str) -> tuple[int, ...]:
        """Of the state's array `name`."""
        per = dict(self.but).get(name, self.per)
        if per == "tensor":
            return (1,) * x.ndim
        if operand == "kernel":
            axes = Axes.of(module.equation)
            kept = {i for i, axis in enumerate(axes.kernel) if axis in axes.out}
        elif operand == "input":
            kept = set(range(x.ndim - len(Axes.of(module.equation).x), x.ndim))
        else:
            kept = {1 if operand == "probabilities" else 2}
        return tuple(size if i in kept else 1 for i, size in enumerate(x.shape))


@dataclasses.dataclass(frozen=True)
class Quantized:
    """Operands pass through the quantiser of the first of the `rules` that finds them.

    Raises:
        ConfigError: the model is used before its operands have been calibrated.
    """

    rules: tuple[Rule, ...]

    def __call__(self, method: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        changed = list(args)
        for i, operand in enumerate(operands(context)):
            rule = self.rule(context.module, operand)
            if rule is not None:
                changed[i] = quantized(context.module, operand, rule, args[i])
        return method(*changed, **kwargs)

    def rule(self, module: Any, operand: str) -> Rule | None:
        """That of an operand; None: it stays as it is."""
        return self.named("/".join((*module.path, operand)))

    def named(self, name: str) -> Rule | None:
        """The rule of an operand by its whole name."""
        for rule in self.rules:
            if re.search(rule.where, name):
                return None if rule.quantizer is None else rule
        return None

    def inside(self, path: str, names: Iterable[str]) -> Quantized:
        """The rules of those operands below a path, by what their names are from there on."""
        found = {name: self.named(f"{path}/{name}") for name in sorted(names)}
        return Quantized(
            tuple(
                dataclasses.replace(rule, where=f"^{re.escape(name)}$")
                for name, rule in found.items()
                if rule is not None
            )
        )

    def smooth(self) -> Quantized:
        """The same, with quantisers in the form in which they are trained."""
        return Quantized(
            tuple(
                dataclasses.replace(rule, quantizer=rule.quantizer and smooth(rule.quantizer))
                for rule in self.rules
            )
        )

    def without(self, where: str) -> Quantized:
        """The same, but for operands that the regex `where` finds, which stay as they are."""
        return Quantized((Rule(where, None), *self.rules))


def quantized(module: Any, operand: str, rule: Rule, x: jax.Array) -> jax.Array:
    """An operand with the state that lies at its module; declared where variables are made."""
    assert rule.quantizer is not None
    if module.is_initializing():
        start = {
            name: jnp.full(rule.shape(operand, module, x, name), value, jnp.float32)
            for name, value in rule.quantizer.state.items()
        }
        module.variable(COLLECTION, operand, lambda: start)
        return x
    if not module.has_variable(COLLECTION, operand):
        name = "/".join((*module.path, operand))
        raise ConfigError(f"{name}: is not calibrated; run the calibration phase first")
    state = module.get_variable(COLLECTION, operand)
    return rule.quantizer(x.astype(jnp.float32), **state).astype(x.dtype)
