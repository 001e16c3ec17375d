"""Names for the leaves of a tree: "blocks_0/attention/query/kernel"."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax


def name_of(path: tuple[Any, ...]) -> str:
    """The slash-joined name of a key path."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def leaves(tree: Any) -> dict[str, Any]:
    """{name: leaf} in tree order."""
    return {name_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def map_named(function: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """`jax.tree.map` whose function receives the name of the leaf first."""
    return jax.tree_util.tree_map_with_path(
        lambda path, *values: function(name_of(path), *values), tree, *rest
    )


def nest(named: Mapping[str, Any]) -> dict[str, Any]:
    """{name: leaf} as a plain nested dict."""
    root: dict[str, Any] = {}
    for name, leaf in named.items():
        *parents, last = name.split("/")
        node = root
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return root


def refill(tree: Any, named: Mapping[str, Any]) -> Any:
    """`tree` with every leaf replaced by the one of the same name."""
    return map_named(lambda name, _: named[name], tree)
