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

    def replace(self, **arguments: Any) -> Make:
        """The same class with these arguments over the stored ones."""
        return Make(self.cls, **{**dict(self.arguments), **arguments})

    def __repr__(self) -> str:
        inside = ", ".join(f"{k}={v!r}" for k, v in self.arguments)
        return f"{self.cls.__name__}({inside})"


def swap(value: Any, old: type, new: type | Make) -> Any:
    """A copy of a task, module, `Make` or tuple in which every `Make(old, ...)` is of `new`.

    `new` receives the arguments that `old` had; if it is a `Make`, under its own.
    `swap(model, Fused, Unfused)` is the same model, on the same parameters, with its attention open
    to interception.
    """
    if isinstance(value, tuple):
        items = tuple(swap(item, old, new) for item in value)
        return value if items == value else items
    if isinstance(value, Make):
        stored = dict(value.arguments)
        parts = _default_parts(value.cls) | stored
        swapped = {name: swap(part, old, new) for name, part in parts.items()}
        kept = {k: v for k, v in swapped.items() if k in stored or v != parts[k]}
        if value.cls is not old:
            return Make(value.cls, **kept)
        new = new if isinstance(new, Make) else Make(new)
        return Make(new.cls, **(kept | dict(new.arguments)))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.init}
        parts.pop("parent", None)  # of a Linen module
        changed = {k: v for k, part in parts.items() if (v := swap(part, old, new)) != part}
        return dataclasses.replace(value, **changed) if changed else value
    return value


def _default_parts(cls: type) -> dict[str, Any]:
    """The default arguments of a class that hold parts."""
    if not dataclasses.is_dataclass(cls):
        return {}
    defaults = {field.name: field.default for field in dataclasses.fields(cls)}
    return {name: value for name, value in defaults.items() if isinstance(value, Make | tuple)}
