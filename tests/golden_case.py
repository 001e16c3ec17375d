"""A reference case of the authors' own code: one .npz file of `JAXFORMER_GOLDEN`."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

DIRECTORY = Path(os.environ.get("JAXFORMER_GOLDEN") or Path(__file__).parent / "golden")


@dataclasses.dataclass(frozen=True)
class Case:
    """`<slug>__<name>.npz`; every shape and flag of a port comes from here."""

    path: Path

    @property
    def slug(self) -> str:
        return self.path.stem.partition("__")[0]

    @property
    def name(self) -> str:
        return self.path.stem.partition("__")[2]

    @functools.cached_property
    def arrays(self) -> dict[str, np.ndarray]:
        with np.load(self.path) as file:
            return {key: file[key] for key in file.files if key != "config"}

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        with np.load(self.path) as file:
            return json.loads(str(file["config"]))

    def part(self, prefix: str) -> dict[str, np.ndarray]:
        """{name: array} of the keys "<prefix>/name"."""
        start = f"{prefix}/"
        found = {k: v for k, v in self.arrays.items() if k.startswith(start)}
        return {k.removeprefix(start): v for k, v in found.items()}

    @property
    def weights(self) -> dict[str, jax.Array]:
        """The authors' parameters by the authors' names."""
        return {name: jnp.asarray(value) for name, value in self.part("param").items()}

    @property
    def inputs(self) -> dict[str, jax.Array]:
        return {name: jnp.asarray(value) for name, value in self.part("in").items()}

    def outputs_and_gradients(
        self, function: Callable[[Mapping[str, Any], Mapping[str, Any]], Any]
    ) -> dict[str, Any]:
        """out/main and the gradients of sum(main * cotangent) by the authors' names.

        `function(weights, inputs)` maps the authors' weights and the inputs to main. Because the
        mapping of names is differentiated too, every gradient has its name in the file.
        """
        inputs = self.inputs
        floats = {k: v for k, v in inputs.items() if jnp.issubdtype(v.dtype, jnp.floating)}

        def scalar(weights: Any, floats: Any) -> Any:
            main = function(weights, {**inputs, **floats})
            return jnp.sum(main * inputs["cotangent"]), main

        gradient = jax.jit(jax.grad(scalar, argnums=(0, 1), has_aux=True))
        (by_weight, by_input), main = gradient(self.weights, floats)
        found = {f"grad_param/{k}": v for k, v in by_weight.items()}
        found |= {f"grad_in/{k}": v for k, v in by_input.items()}
        wanted = {k: v for k, v in found.items() if k in self.arrays}
        return {"out/main": main, **wanted}

    def check(self, key: str, value: Any) -> None:
        """|value - reference| <= rtol |reference| + atol max(1, max |reference|), of the file.

        A file may have other tolerances for single outputs.
        """
        reference = self.arrays[key]
        value = np.asarray(value)
        assert value.shape == reference.shape, f"{key}: shape {value.shape}, file {reference.shape}"
        scale = max(1.0, float(np.max(np.abs(reference), initial=0.0)))
        own = {**self.config, **self.config.get("tolerance_overrides", {}).get(key, {})}
        limit = own["rtol"] * np.abs(reference) + own["atol"] * scale
        error = np.abs(value - reference)
        assert np.all(error <= limit), (
            f"{key}: off by {np.max(error - limit):.3g} over the tolerance"
        )


def cases() -> list[Case]:
    """All files of the directory."""
    return [Case(path) for path in sorted(DIRECTORY.glob("*__*.npz"))]
