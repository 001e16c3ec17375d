"""How other people's tensors lie over our parameters: one table, read in both directions."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from einops import rearrange

from jaxformer import paths
from jaxformer.errors import ConfigError
from jaxformer.interop.tensors import TensorFileError, Tensors
from jaxformer.recipe import Params


@dataclasses.dataclass(frozen=True)
class Rule:
    """Our parameter is their tensor, its axes rearranged by an einops pattern from theirs to ours.

    `Rule("mixer/query/kernel", "q_proj.weight", "(h k) d -> d h k")` reads a torch Linear. Of
    several names on one side the pattern sees a stack, along the first axis: a fused projection is
    `Rule((query, key, value), "qkv.weight", "(n h k) d -> n d h k")`. The sizes of axes are those
    of our parameter.
    """

    ours: str | tuple[str, ...]
    theirs: str | tuple[str, ...]
    form: str = ""  # the same

    @property
    def our_names(self) -> tuple[str, ...]:
        return (self.ours,) if isinstance(self.ours, str) else self.ours

    @property
    def their_names(self) -> tuple[str, ...]:
        return (self.theirs,) if isinstance(self.theirs, str) else self.theirs

    def at(self, layer: int) -> Rule:
        """With "{}" in the names replaced by the number of a layer."""

        def put(names: str | tuple[str, ...]) -> str | tuple[str, ...]:
            if isinstance(names, str):
                return names.format(layer)
            return tuple(name.format(layer) for name in names)

        return Rule(put(self.ours), put(self.theirs), self.form)

    def read(self, arrays: Sequence[np.ndarray], shape: tuple[int, ...]) -> list[np.ndarray]:
        """Our arrays, each of `shape`, of theirs."""
        stacked = arrays[0] if isinstance(self.theirs, str) else list(arrays)
        if self.form:
            sizes = self._given(self.form.partition("->")[0], shape)
            stacked = rearrange(stacked, self.form, **sizes)
        return [stacked] if isinstance(self.ours, str) else list(stacked)

    def write(self, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Their arrays of ours."""
        stacked = arrays[0] if isinstance(self.ours, str) else list(arrays)
        if self.form:
            theirs, _, ours = self.form.partition("->")
            sizes = self._given(ours, arrays[0].shape)
            stacked = rearrange(stacked, f"{ours.strip()} -> {theirs.strip()}", **sizes)
        return [stacked] if isinstance(self.theirs, str) else list(stacked)

    def their_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of each of their tensors where ours have `shape`."""
        if not self.form:
            return shape
        sizes = self._sizes(shape)
        groups = re.findall(r"\(([^)]*)\)|(\S+)", self.form.partition("->")[0])
        axes = [math.prod(sizes[axis] for axis in (a or b).split()) for a, b in groups]
        return tuple(axes if isinstance(self.theirs, str) else axes[1:])

    def _sizes(self, shape: Sequence[int]) -> dict[str, int]:
        axes = self.form.partition("->")[2].split()
        lead = () if isinstance(self.ours, str) else (len(self.ours),)
        sizes = dict(zip(axes, (*lead, *shape), strict=True))
        if not isinstance(self.theirs, str):
            sizes[self.form.split()[0]] = len(self.theirs)
        return {"1": 1, **sizes}

    def _given(self, side: str, shape: Sequence[int]) -> dict[str, int]:
        """Sizes of the named axes that stand in a group on one side of the pattern."""
        grouped = " ".join(re.findall(r"\(([^)]*)\)", side)).split()
        return {axis: n for axis, n in self._sizes(shape).items() if axis in grouped}


@dataclasses.dataclass(frozen=True)
class Layout:
    """All rules of a model.

    `prefix` stands before their names in some files and not in others; tensors that match
    `ignored` are no parameters (buffers, copies of tied weights).
    """

    rules: tuple[Rule, ...]
    prefix: str = ""
    ignored: str = r"(?!)"

    def read(self, tensors: Tensors, abstract: Params, dtype: Any = None) -> Params:
        """Parameters like `abstract` (shapes, and shardings where it has them), file by file.

        One tensor at a time is in the memory of the host. Leaves keep the type of the file, or
        take `dtype`.

        Raises:
            TensorFileError: a tensor is missing, unknown or of another shape; named with its file.
        """
        wanted = paths.leaves(abstract)
        self._check_rules(wanted)
        rules = [self._named(rule, tensors.names) for rule in self.rules]
        self._check_tensors(rules, tensors, wanted)
        order = {name: i for i, name in enumerate(tensors.names)}
        found: dict[str, jax.Array] = {}
        for rule in sorted(rules, key=lambda rule: order[rule.their_names[0]]):
            first = wanted[rule.our_names[0]]
            arrays = rule.read([tensors.read(name) for name in rule.their_names], first.shape)
            for name, array in zip(rule.our_names, arrays, strict=True):
                found[name] = place(array, wanted[name], dtype)
        return paths.refill(abstract, found)

    def write(self, params: Params) -> Iterator[tuple[str, np.ndarray]]:
        """Their tensors of our parameters, with the prefix, one rule after another."""
        ours = paths.leaves(params)
        self._check_rules(ours)
        for rule in self.rules:
            arrays = rule.write([np.asarray(ours[name]) for name in rule.our_names])
            yield from zip(rule.their_names, arrays, strict=True)

    def _named(self, rule: Rule, names: Sequence[str]) -> Rule:
        """The rule with the names of the file, which may lack the prefix."""
        held = set(names)

        def choose(name: str) -> str:
            short = name.removeprefix(self.prefix)
            return short if name not in held and short in held else name

        if isinstance(rule.theirs, str):
            return dataclasses.replace(rule, theirs=choose(rule.theirs))
        return dataclasses.replace(rule, theirs=tuple(map(choose, rule.theirs)))

    def _check_rules(self, ours: dict[str, Any]) -> None:
        covered = [name for rule in self.rules for name in rule.our_names]
        wrong = sorted(set(ours) ^ set(covered)) or sorted(
            {n for n in covered if covered.count(n) > 1}
        )
        if wrong:
            raise ConfigError(
                f"layout: parameter {wrong[0]!r} must be under exactly one rule and exist "
                f"({len(wrong)} do not)"
            )

    def _check_tensors(self, rules: Sequence[Rule], tensors: Tensors, ours: dict[str, Any]) -> None:
        known = {name for rule in rules for name in rule.their_names}
        missing = sorted(known - set(tensors.names))
        extra = [n for n in tensors.names if n not in known and not re.search(self.ignored, n)]
        where = tensors.where(tensors.names[0]) if tensors.names else "the file"
        if missing:
            near = f"; it has {extra[0]!r}, unknown here" if extra else ""
            raise TensorFileError(
                f"{where}: tensor {missing[0]!r} is missing ({len(missing)} are{near}); does the "
                "config belong to these weights?"
            )
        if extra:
            raise TensorFileError(
                f"{tensors.where(extra[0])}: tensor {extra[0]!r} is unknown to this model "
                f"({len(extra)} are); does the config belong to these weights?"
            )
        for rule in rules:
            shape = rule.their_shape(tuple(ours[rule.our_names[0]].shape))
            for name in rule.their_names:
                if tensors.shape(name) != shape:
                    raise TensorFileError(
                        f"{tensors.where(name)}: tensor {name!r} has shape {tensors.shape(name)}, "
                        f"the config makes it {shape}; does the config belong to these weights?"
                    )


def place(array: np.ndarray, like: Any, dtype: Any = None) -> jax.Array:
    """An array where `like` says; every process holds all of it and keeps its own part."""
    array = array if dtype is None else array.astype(dtype)
    if getattr(like, "sharding", None) is None:
        return jax.device_put(array)
    return jax.make_array_from_callback(array.shape, like.sharding, lambda index: array[index])


def layers(depth: int, *rules: Rule) -> tuple[Rule, ...]:
    """Rules with "{}" in their names, for every layer."""
    return tuple(rule.at(i) for i in range(depth) for rule in rules)


def same(ours: str, theirs: str, *leaves: tuple[str, str]) -> tuple[Rule, ...]:
    """Rules without rearrangement for pairs of leaf names (ours, theirs) below two prefixes."""
    return tuple(Rule(f"{ours}/{a}", f"{theirs}.{b}") for a, b in leaves)


def norm(ours: str, theirs: str, *, bias: bool = True) -> tuple[Rule, ...]:
    """A LayerNorm, or without `bias` an RMSNorm."""
    return same(ours, theirs, ("scale", "weight"), *([("bias", "bias")] if bias else []))


def linear(
    ours: str, theirs: str, form: str = "o i -> i o", *, bias: bool = True
) -> tuple[Rule, ...]:
    """A torch Linear; the bias follows from the output axes of `form`."""
    rules = (Rule(f"{ours}/kernel", f"{theirs}.weight", form),)
    if not bias:
        return rules
    out = re.match(r"\([^)]*\)|\S+", form).group()  # type: ignore[union-attr]
    flat = out.strip("()")
    return (
        *rules,
        Rule(f"{ours}/bias", f"{theirs}.bias", f"{out} -> {flat}" if flat != out else ""),
    )


TO_HEADS = "(h k) d -> d h k"
FROM_HEADS = "d (h k) -> h k d"


def attention(
    ours: str, theirs: str, names: Sequence[str], *, bias: bool = True, out_bias: bool | None = None
) -> tuple[Rule, ...]:
    """An `Attention` from four torch Linears, `names` being those of query, key, value and out."""
    rules: tuple[Rule, ...] = ()
    for part, name in zip(("query", "key", "value"), names, strict=False):
        rules += linear(f"{ours}/{part}", f"{theirs}.{name}", TO_HEADS, bias=bias)
    out_bias = bias if out_bias is None else out_bias
    return rules + linear(f"{ours}/out", f"{theirs}.{names[3]}", FROM_HEADS, bias=out_bias)
