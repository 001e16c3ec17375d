"""A model whose modules' methods are changed from outside: where tasks want a model."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from flax import linen as nn

from jaxformer import paths
from jaxformer.errors import ConfigError
from jaxformer.nn.interception import Interceptor
from jaxformer.tasks.linen import CALL_ONLY


@dataclasses.dataclass(frozen=True)
class Wrapper:
    """A model around another `model`, which stands for it where tasks want one."""

    model: Any

    def prepare(self, variables: Mapping[str, Any]) -> Mapping[str, Any]:
        """Variables, this model's own ones in a form that many answers are quicker from."""
        return variables


def inside(model: Any, change: Callable[[Any], Any]) -> Any:
    """`model` with `change` applied to the module below all that is wrapped around it."""
    if isinstance(model, Wrapper):
        return dataclasses.replace(model, model=inside(model.model, change))
    return change(model)


def innermost(model: Any) -> Any:
    """The module below all that is wrapped around it."""
    return innermost(model.model) if isinstance(model, Wrapper) else model


def prepared(model: Any, variables: Mapping[str, Any]) -> Mapping[str, Any]:
    """`variables` for many answers: what a model unpacks in each of them is unpacked once.

    They give the same answers, take the memory of unpacked ones, and are not to be saved.
    """
    if isinstance(model, Wrapper):
        return prepared(model.model, model.prepare(variables))
    return variables


@dataclasses.dataclass(frozen=True)
class Intercepted(Wrapper):
    """`model` with `interceptors` around every method of its modules, the first outermost.

    An interceptor is a frozen dataclass with `__call__(method, args, kwargs, context)`, so that two
    equal models are equal. It may read and declare variables of `context.module`: parameters where
    the module's own are, other collections in the `extra` of a state.
    """

    interceptors: tuple[Interceptor, ...]

    def init(self, *args: Any, **kwargs: Any) -> Any:
        with self.active():
            return self.model.init(*args, **kwargs)

    def apply(self, *args: Any, **kwargs: Any) -> Any:
        with self.active():
            return self.model.apply(*args, **kwargs)

    def complete(
        self, key: jax.Array, params: Any, extra: Any, *args: Any, fresh: str = "", **kwargs: Any
    ) -> tuple[Any, Any]:
        """`params` and `extra` with what the interceptors declare beside them, for `Phase.enter`.

        New variables are initialised where these stand, so that a scale or a step which starts from
        a weight starts from the trained one. `args` is what the model is called with; its values
        do not matter to that. The names of new parameters must have a match of the regex `fresh`.

        Raises:
            ConfigError: others are missing; names them.
        """
        collections = {name: tree for name, tree in extra.items() if isinstance(tree, Mapping)}
        with self.active():
            _, found = self.model.apply(
                {"params": params, **collections},
                *args,
                rngs={"params": key},
                mutable=True,
                **kwargs,
            )
        kept = paths.leaves(params).keys()
        missing = [name for name in paths.leaves(found["params"]) if name not in kept]
        unasked = [name for name in missing if not re.search(fresh, name)]
        if unasked:
            raise ConfigError(
                f"parameters: {', '.join(unasked[:3])} and {len(unasked)} in all are missing; "
                "give the state of a phase in which they were trained"
            )
        new = {name: tree for name, tree in found.items() if name not in CALL_ONLY}
        return found["params"], {**extra, **new}

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for interceptor in self.interceptors:
                stack.enter_context(nn.intercept_methods(interceptor))
            yield


def interceptors(model: Any) -> tuple[Interceptor, ...]:
    """All that a model is intercepted by, the outermost first."""
    if not isinstance(model, Wrapper):
        return ()
    own = model.interceptors if isinstance(model, Intercepted) else ()
    return (*own, *interceptors(model.model))
