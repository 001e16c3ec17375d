"""Dense-sparse factors of the layers of every block, as they are stored and applied."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax

from jaxformer import paths
from jaxformer.compress.compressor import Facts, check_unpacked, share_of
from jaxformer.compress.factored import LINEAR, STATE, Table, prepared_state
from jaxformer.compress.factorize import choose
from jaxformer.compress.factors import FactorSpec
from jaxformer.compress.intercepted import Wrapper
from jaxformer.compress.matrix import as_matrix
from jaxformer.compress.packed import Codes, unpacked
from jaxformer.errors import ConfigError
from jaxformer.papers.dsformer.model import Method
from jaxformer.recipe import Batch, Extra, Params

COLUMNS = (64, 32, 16, 8)  # q: the paper's, or less where it does not divide the inputs


@dataclasses.dataclass(frozen=True)
class Factorised:
    """Factors of the layers of blocks, found on the weights alone.

    They are `ratio` times smaller with the best spec of that ratio, or have S of `pattern` (n, m).
    """

    ratio: float = 0.0
    pattern: tuple[int, int] | None = None
    note: str = "factorised in one shot, without training after it"

    def find(
        self, task: Any, params: Params, extra: Extra, batch: Batch
    ) -> tuple[Params, Extra, Facts]:
        del task, batch
        check_unpacked(params)
        specs: dict[tuple[int, ...], FactorSpec] = {}
        rows: list[list[Any]] = []
        for name, kernel in paths.leaves(params).items():
            path, _, leaf = name.rpartition("/")
            if leaf == "kernel" and re.search(LINEAR, path):
                w = as_matrix(name, kernel)
                if w.ndim != 2:
                    raise ConfigError(f"{path}: layers are stacked; set model.scan=False")
                spec = specs.get(w.shape) or specs.setdefault(w.shape, self.spec(w, path))
                rows.append([path, spec.columns, spec.atoms, spec.nonzeros, spec.group])
        found = {"factors": rows}
        method = self.method(found)
        params, state = method.enter(params, jax.random.key(0))
        return params, {**extra, STATE: pack_indices(state, method.table)}, found

    def spec(self, w: jax.Array, path: str) -> FactorSpec:
        """The best spec of the ratio for a matrix, of the widest blocks that reach it.

        With a pattern r = q / 2, for which that is most of what S saves.
        """
        *wider, least = [q for q in COLUMNS if w.shape[1] % q == 0] or [1]
        if self.pattern is not None:
            (n, m), columns = self.pattern, [*wider, least][0]
            spec = FactorSpec(columns, columns // 2, columns // 2 * n // m, group=m)
            spec.check(w.shape[0], w.shape[1], path)
            return spec
        for columns in wider:
            with contextlib.suppress(ConfigError):
                return choose(w, self.ratio, columns=columns, name=path)
        return choose(w, self.ratio, columns=least, name=path)

    def method(self, found: Facts) -> Method:
        specs = (
            (rf"^{path}$", FactorSpec(columns, atoms, nonzeros, group=group))
            for path, columns, atoms, nonzeros, group in found["factors"]
        )
        return Method("frozen", Table(tuple(specs)))

    def task(self, task: Any, found: Facts) -> Any:
        method = self.method(found)
        model = PackedFactors(method.model(task.model), method.table)
        return dataclasses.replace(task, model=model)


def pack_indices(state: Any, table: Table) -> dict[str, Any]:
    """The collection `STATE` with indices of as few bits as say where a value is."""
    named = {}
    for name, indices in paths.leaves(state).items():
        spec = table.of(name.rpartition("/")[0])
        assert spec is not None
        named[name] = Codes.of(indices - spec.groups(), spec.index_bits)
    return paths.nest(named)


def located(variables: Mapping[str, Any], table: Table) -> dict[str, Any]:
    """Variables with arrays in the place of codes: the inverse."""

    def one(name: str, leaf: jax.Array) -> jax.Array:
        spec = table.of(name.rpartition("/")[0]) if name.endswith("/indices") else None
        return leaf if spec is None else leaf + spec.groups()

    found = unpacked(variables)
    return {**found, STATE: paths.map_named(one, found[STATE])}


@dataclasses.dataclass(frozen=True)
class PackedFactors(Wrapper):
    """A factorised model whose supports lie packed in its state."""

    table: Table

    def init(self, *args: Any, **kwargs: Any) -> Any:
        made = self.model.init(*args, **kwargs)
        return {**made, STATE: pack_indices(made[STATE], self.table)}

    def prepare(self, variables: Mapping[str, Any]) -> Mapping[str, Any]:
        found = located(variables, self.table)
        return {**found, STATE: prepared_state(found["params"], found[STATE], self.table)}

    def apply(self, variables: Any, *args: Any, **kwargs: Any) -> Any:
        return self.model.apply(located(variables, self.table), *args, **kwargs)


def compressor(argument: str) -> Factorised:
    """DSFormer's factors, so many times smaller than the layers: "2.8"; or with S "2:4"."""
    if match := re.fullmatch(r"(\d+):(\d+)", argument):
        n, m = int(match[1]), int(match[2])
        if not 1 <= n < m <= min(COLUMNS) // 2:
            raise ConfigError(f"method: {argument!r} must be of 1 to {m - 1} values in {m}, m <= 4")
        return Factorised(pattern=(n, m))
    what = "how many times smaller, such as 2.8, or a pattern such as 2:4"
    return Factorised(share_of(argument, what, 1.0, 100.0))
