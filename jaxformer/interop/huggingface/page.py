"""A `config.json`, read field by field: what is missing, mistyped or unknown is said by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from jaxformer.errors import ConfigError
from jaxformer.nn.activation import GELU, GELU_TANH, QUICK_GELU, RELU, SILU, TANH
from jaxformer.nn.make import Make

ACTIVATIONS: Mapping[str, Make] = {
    "gelu": GELU,
    "gelu_new": GELU_TANH,
    "gelu_fast": GELU_TANH,
    "gelu_pytorch_tanh": GELU_TANH,
    "quick_gelu": QUICK_GELU,
    "relu": RELU,
    "silu": SILU,
    "swish": SILU,
    "tanh": TANH,
}
LARGEST = 2**31 - 1
REQUIRED: Any = object()


class UnsupportedArchitecture(ConfigError):
    """A Hugging Face config that asks for something jaxformer does not build."""


@dataclasses.dataclass(frozen=True)
class Page:
    """The fields of a `config.json`; `source` is its path, for messages.

    Every reader takes a default for a field that is absent, and raises `ConfigError` naming the
    file and the field where there is none or the value is of another kind.
    """

    values: Mapping[str, Any]
    source: str = "config.json"

    def _get(self, name: str, default: Any) -> Any:
        value = self.values.get(name)
        if value is None and default is REQUIRED:
            raise ConfigError(f"{self.source}: field {name!r} is missing")
        return default if value is None else value

    @property
    def architecture(self) -> str:
        """The class that wrote the weights, such as "BertForMaskedLM"."""
        named = self.values.get("architectures")
        return str(named[0]) if isinstance(named, list | tuple) and named else ""

    def integer(self, name: str, default: Any = REQUIRED, most: int = LARGEST) -> Any:
        """A number in 1 .. `most`."""
        value = self._get(name, default)
        if value is default and not isinstance(value, int):
            return value
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
            raise self.wrong(name, f"an integer in 1 .. {most}")
        return value

    def integers(self, name: str) -> tuple[int, ...]:
        """A list of numbers of at least 1."""
        value = self._get(name, REQUIRED)
        good = isinstance(value, list | tuple) and 1 <= len(value) <= 100
        if not good or not all(type(n) is int and 1 <= n <= 10_000 for n in value):
            raise self.wrong(name, "a list of integers in 1 .. 10000")
        return tuple(value)

    def depth(self, name: str) -> int:
        """A number of layers."""
        return self.integer(name, most=10_000)

    def number(self, name: str, default: Any = REQUIRED) -> Any:
        """A finite number of at least 0."""
        value = self._get(name, default)
        if value is default and not isinstance(value, int | float):
            return value
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.wrong(name, "a number")
        if not 0 <= value < float("inf"):
            raise self.wrong(name, "finite and at least 0")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self._get(name, default)
        if not isinstance(value, bool):
            raise self.wrong(name, "true or false")
        return value

    def text(self, name: str, default: Any = REQUIRED) -> Any:
        value = self._get(name, default)
        if value is not default and not isinstance(value, str):
            raise self.wrong(name, "a text")
        return value

    def section(self, *names: str) -> Page:
        """The first of these fields that is there, as a page of its own; else an empty one."""
        for name in names:
            if self.values.get(name) is not None:
                if not isinstance(self.values[name], Mapping):
                    raise self.wrong(name, "an object")
                return Page(self.values[name], f"{self.source}: {name}")
        return Page({}, f"{self.source}: {names[0]}")

    def activation(self, name: str, default: str) -> Make:
        function = self.text(name, default)
        if function not in ACTIVATIONS:
            raise self.unsupported(name, ACTIVATIONS)
        return ACTIVATIONS[function]

    def classes(self) -> int:
        """The number of classes of a classifier: that of `id2label`, else `num_labels`, else 2."""
        labels = self.section("id2label").values
        return len(labels) or self.integer("num_labels", 2)

    def require(self, name: str, *allowed: Any) -> None:
        """Raise unless the field is absent or one of `allowed`: nothing else is built."""
        value = self.values.get(name)
        if value is not None and value not in allowed:
            raise self.unsupported(name, allowed)

    def wrong(self, name: str, wanted: str) -> ConfigError:
        return ConfigError(
            f"{self.source}: field {name!r} is {self.values.get(name)!r}; must be {wanted}"
        )

    def unsupported(self, name: str, allowed: Sequence[Any] | Mapping[str, Any]) -> ConfigError:
        known = ", ".join(map(str, allowed))
        return UnsupportedArchitecture(
            f"{self.source}: {name}={self.values.get(name)!r} is not supported; supported: {known}"
        )
