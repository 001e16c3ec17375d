"""Which implementation runs an operation, and why: shared by every kernel.

An operation lists its `Implementation`s. `choose` never replaces an explicit choice: it runs what
was asked for or raises, naming who can do it.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jaxformer.errors import ConfigError


class Refusal(NamedTuple):
    """What an implementation cannot do, and why."""

    feature: str
    why: str


class KernelUnsupported(ValueError):
    """An implementation was asked for something that it cannot do."""

    def __init__(self, feature: str, impl: str, why: str, who_can: Sequence[str]) -> None:
        self.feature, self.impl, self.why, self.who_can = feature, impl, why, tuple(who_can)
        instead = ", ".join(map(repr, who_can)) or "none"
        super().__init__(f"impl={impl!r} does not support {feature}: {why}; who can: {instead}")


@dataclasses.dataclass(frozen=True)
class Implementation:
    """`refuse(request)` says what is in the way, None when nothing is; `run(request)` computes.

    `tiles(request)` are the sizes it works in, None where a library chooses or there are none.
    """

    name: str
    refuse: Callable[[Any], Refusal | None]
    run: Callable[[Any], Any]
    tiles: Callable[[Any], tuple[int, int] | None] = lambda request: None


class Deferred:
    """A module by its name, imported when something of it is first asked for.

    Pallas and its dialects take two seconds to import, which a program on a CPU never needs.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(importlib.import_module(self._name), attribute)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What will run, at what cost. `flops` counts visible scores only; 2 per multiply-add."""

    impl: str
    tiles: tuple[int, int] | None
    flops: int
    hbm_bytes: int
    why: str

    def __str__(self) -> str:
        tiles = "" if self.tiles is None else f", tiles {self.tiles[0]} x {self.tiles[1]}"
        return (
            f"{self.impl}{tiles}: {self.flops / 1e9:.3g} GFLOP, {self.hbm_bytes / 2**20:.3g} MiB "
            f"to and from memory ({self.why})"
        )


def choose(
    implementations: Sequence[Implementation],
    request: Any,
    name: str,
    error: type[KernelUnsupported] = KernelUnsupported,
) -> Implementation:
    """The implementation called `name`; raises `error` where it refuses, ConfigError if unknown."""
    found = next((x for x in implementations if x.name == name), None)
    if found is None:
        names = ["auto", *(x.name for x in implementations)]
        raise ConfigError(f"impl={name!r} is unknown; allowed: {names}")
    refusal = found.refuse(request)
    if refusal is not None:
        who_can = [x.name for x in implementations if x.refuse(request) is None]
        raise error(refusal.feature, name, refusal.why, who_can)
    return found
