"""Dense-sparse factors of the layers of every block, as they are stored and applied."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from typing import Any

import jax

from jaxformer import paths
from jaxformer.compress.compressor import Facts, check_unpacked, share_of
from jaxformer.compress.factored import LINEAR, STATE, Table
from jaxformer.compress.factorize import FactorSpec, choose
from jaxformer.compress.intercepted import Wrapper
from jaxformer.compress.matrix import as_matrix
from jaxformer.compress.packed import Codes, unpacked
from jaxformer.errors import ConfigError
from jaxformer.papers.dsformer.model import Method
from jaxformer.recipe import Batch, Extra, Params

COLUMNS = (64, 32, 16, 8)  # q: the paper's, or less where it does not divide the inputs


@dataclasses.dataclass(frozen=True)
class Factorised:
    """Factors so many times smaller than the layers of blocks, found on the weights alone."""

    ratio: float
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
                rows.append([path, spec.columns, spec.atoms, spec.nonzeros])
        found = {"factors": rows}
        method = self.method(found)
        params, state = method.enter(params, jax.random.key(0))
        return params, {**extra, STATE: pack_indices(state, method.table)}, found

    def spec(self, w: jax.Array, path: str) -> FactorSpec:
        """The best spec of the ratio for a matrix, of the widest blocks that reach it."""
        *wider, least = [q for q in COLUMNS if w.shape[1] % q == 0] or [1]
        for columns in wider:
            with contextlib.suppress(ConfigError):
                return choose(w, self.ratio, columns=columns, name=path)
        return choose(w, self.ratio, columns=least, name=path)

    def method(self, found: Facts) -> Method:
        specs = (
            (rf"^{path}$", FactorSpec(columns, atoms, nonzeros))
            for path, columns, atoms, nonzeros in found["factors"]
        )
        return Method("frozen", Table(tuple(specs)))

    def task(self, task: Any, found: Facts) -> Any:
        method = self.method(found)
        model = PackedFactors(method.model(task.model), method.table)
        return dataclasses.replace(task, model=model)


def pack_indices(state: Any, table: Table) -> dict[str, Any]:
    """The collection `STATE` with indices of as many bits as the bases have rows."""
    named = {}
    for name, indices in paths.leaves(state).items():
        spec = table.of(name.rpartition("/")[0])
        assert spec is not None
        named[name] = Codes.of(indices, spec.index_bits)
    return paths.nest(named)


@dataclasses.dataclass(frozen=True)
class PackedFactors(Wrapper):
    """A factorised model whose supports lie packed in its state."""

    table: Table

    def init(self, *args: Any, **kwargs: Any) -> Any:
        made = self.model.init(*args, **kwargs)
        return {**made, STATE: pack_indices(made[STATE], self.table)}

    def apply(self, variables: Any, *args: Any, **kwargs: Any) -> Any:
        return self.model.apply(unpacked(variables), *args, **kwargs)


def compressor(argument: str) -> Factorised:
    """DSFormer's factors, so many times smaller than the layers: "2.8"."""
    return Factorised(share_of(argument, "how many times smaller, such as 2.8", 1.0, 100.0))
