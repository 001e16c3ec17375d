"""What everything that changes a model from outside shares: finding modules by path."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from flax import linen as nn

Interceptor = Callable[[Callable[..., Any], Any, Any, nn.module.InterceptorContext], Any]


def path_of(module: nn.Module) -> str:
    """As in "encoder/stack/block_0/mlp/up"."""
    return "/".join(module.path)


def fits(pattern: str, module: nn.Module) -> bool:
    """Whether the path of a module, "encoder/stack/block_0/mlp/up", has a match of `pattern`."""
    return re.search(pattern, path_of(module)) is not None
