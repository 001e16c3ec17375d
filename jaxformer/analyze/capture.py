"""What modules read and give while a model runs, seen and changed from outside.

A `Site` names modules by path and class. `capture` runs any model of the library, returns what
passes its sites, and changes on the way what `Edit`s say. `jaxformer.nn.make.swap(model, Fused,
Unfused)` opens attention up beforehand. All functions here are pure and may be compiled.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from flax import linen as nn

from jaxformer.errors import ConfigError
from jaxformer.nn.interception import fits, path_of

CAPTURED = "captured"  # the collection that values travel in
Values = Mapping[str, tuple[jax.Array, ...]]  # by path, one for each call of the module


@dataclasses.dataclass(frozen=True)
class Site:
    """What goes into, or comes out of, modules.

    Those of class `kind` whose path has a match of the regex `pattern`. `argument` is the place of
    a positional argument of `method`, None its result. `call` is one of the calls of a module that
    is called several times, as the blocks of a looped stack are.
    """

    pattern: str = ""
    kind: type[nn.Module] = nn.Module
    argument: int | None = None
    method: str = "__call__"
    call: int | None = None

    def at(self, context: nn.module.InterceptorContext) -> bool:
        """Whether a module and method are meant, whichever call it is."""
        named = context.method_name == self.method and isinstance(context.module, self.kind)
        return named and fits(self.pattern, context.module)

    def exactly(self, path: str, call: int) -> Site:
        """The same of one call of one module."""
        return dataclasses.replace(self, pattern=f"^{re.escape(path)}$", call=call)

    def __str__(self) -> str:
        what = "the result" if self.argument is None else f"argument {self.argument}"
        return f"{what} of {self.kind.__name__}.{self.method} at {self.pattern!r}"


BLOCKS = Site(r"(^|/)block_\d+$", argument=0)  # the stream, as each block of a `Stack` reads it


@dataclasses.dataclass(frozen=True)
class Edit:
    """`change(value)` in place of what passes a site; sites that meet see it changed."""

    site: Site
    change: Callable[[jax.Array], jax.Array]


class Run(NamedTuple):
    """The output of a model and the values of each site."""

    output: Any
    values: tuple[Values, ...]


def capture(
    model: Any,
    variables: Any,
    *args: Any,
    sites: Sequence[Site] = (),
    edits: Sequence[Edit] = (),
    **kwargs: Any,
) -> Run:
    """`model.apply(variables, *args, **kwargs)`, with what passes `sites` under `edits`.

    What an edit does not let through is not computed once this is compiled: replace the stream at
    a block, and nothing before it runs. The blocks of a `ScannedStack` have one path, and their
    values lie along a first axis.

    Raises:
        ConfigError: the model has no such site.
    """
    passing = _Passing(sites, edits)
    with nn.intercept_methods(passing):
        output, changed = model.apply(variables, *args, mutable=[CAPTURED], **kwargs)
    for site in (*sites, *(edit.site for edit in edits)):
        if site not in passing.met:
            raise ConfigError(
                f"{site}: the model calls no such module. Attention has Scores, Softmax and Mix "
                "after swap(model, Fused, Unfused), blocks have paths with model.scan=False"
            )
    found = changed.get(CAPTURED, {})
    values = (dict(_values(found, f"site_{i}")) for i in range(len(sites)))
    # By the order of the calls: of names alone, block_10 would come before block_2.
    order = {path: i for i, path in enumerate(passing.order)}
    return Run(output, tuple({p: v[p] for p in sorted(v, key=order.__getitem__)} for v in values))


class _Passing:
    """The interceptor of one `capture`, which counts the calls of each module."""

    def __init__(self, sites: Sequence[Site], edits: Sequence[Edit]) -> None:
        self.sites, self.edits = sites, edits
        self.calls: dict[tuple[Any, ...], int] = {}
        self.met: set[Site] = set()
        self.order: dict[str, None] = {}  # paths, as they were called

    def __call__(self, method: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        every = (*self.sites, *(edit.site for edit in self.edits))
        if not any(site.at(context) for site in every):
            return method(*args, **kwargs)
        name = (*context.module.path, context.method_name)
        call = self.calls[name] = self.calls.get(name, -1) + 1
        here = {site for site in every if site.at(context) and site.call in (None, call)}
        self.met |= here
        self.order.setdefault(path_of(context.module))
        args = list(args)
        for i in range(len(args)):
            args[i] = self._pass(args[i], i, here, context.module)
        return self._pass(method(*args, **kwargs), None, here, context.module)

    def _pass(self, value: Any, argument: int | None, here: set[Site], module: nn.Module) -> Any:
        for edit in self.edits:
            if edit.site in here and edit.site.argument == argument:
                value = edit.change(value)
        for i, site in enumerate(self.sites):
            if site in here and site.argument == argument:
                module.sow(CAPTURED, f"site_{i}", value)
        return value


def _values(tree: Any, name: str, path: tuple[str, ...] = ()) -> Any:
    for key, child in tree.items():
        if isinstance(child, Mapping):
            yield from _values(child, name, (*path, key))
        elif key == name:
            yield "/".join(path), child


def passed(model: Any, variables: Any, *args: Any, site: Site, **kwargs: Any) -> tuple[Site, ...]:
    """Each single call at a site, in the order in which a model makes them; computes nothing.

    `passed(model, variables, tokens, site=BLOCKS)` are the layers, looped ones as often as they
    run.

    Raises:
        ConfigError: there is none.
    """
    order: list[Site] = []
    calls: dict[str, int] = {}

    def note(method: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        if site.at(context):
            path = path_of(context.module)
            calls[path] = calls.get(path, -1) + 1
            if site.call in (None, calls[path]):
                order.append(site.exactly(path, calls[path]))
        return method(*args, **kwargs)

    def run(variables: Any, args: Any) -> Any:
        with nn.intercept_methods(note):
            return model.apply(variables, *args, **kwargs)

    jax.eval_shape(run, variables, args)
    if not order:
        raise ConfigError(f"{site}: the model calls no such module; is model.scan=False?")
    return tuple(order)


def only(values: Values) -> jax.Array:
    """The value of a site that is passed once."""
    (calls,) = values.values()
    (value,) = calls
    return value
