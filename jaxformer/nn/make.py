"""`Make`: a module class with its arguments, as a value that can be compared and passed around."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True, init=False)
class Make:
    """A frozen factory: `Make(FlowAttention, heads=8)` builds the module where it is called.

    A module instance passed down would land under the wrong parent or share one set of weights
    between blocks, and `functools.partial` compares by identity, so that two equal models would
    be unequal and retrace. Two equal `Make`s are equal.
    """

    cls: type
    arguments: tuple[tuple[str, Any], ...]

    def __init__(self, cls: type, **arguments: Any) -> None:
        object.__setattr__(self, "cls", cls)
        object.__setattr__(self, "arguments", tuple(sorted(arguments.items())))

    def __call__(self, **more: Any) -> Any:
        """Build the module; `more` (usually `name=`) goes over the stored arguments."""
        return self.cls(**{**dict(self.arguments), **more})

    def __repr__(self) -> str:
        inside = ", ".join(f"{k}={v!r}" for k, v in self.arguments)
        return f"{self.cls.__name__}({inside})"
