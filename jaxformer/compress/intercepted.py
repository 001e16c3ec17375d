"""A model whose modules' methods are changed from outside: where tasks want a model."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from flax import linen as nn

Interceptor = Callable[[Callable[..., Any], Any, Any, nn.module.InterceptorContext], Any]


@dataclasses.dataclass(frozen=True)
class Intercepted:
    """`model` with `interceptors` around every method of its modules, the last outermost.

    An interceptor is a frozen dataclass with `__call__(method, args, kwargs, context)`, so that two
    equal models are equal. It may read and declare variables of `context.module`: parameters where
    the module's own are, other collections in the `extra` of a state.
    """

    model: Any
    interceptors: tuple[Interceptor, ...]

    def init(self, *args: Any, **kwargs: Any) -> Any:
        with self.active():
            return self.model.init(*args, **kwargs)

    def apply(self, *args: Any, **kwargs: Any) -> Any:
        with self.active():
            return self.model.apply(*args, **kwargs)

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for interceptor in self.interceptors:
                stack.enter_context(nn.intercept_methods(interceptor))
            yield
