"""A checkpoint of any kind, opened: a run of `fit`, or a Hugging Face folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jaxformer.catalogue import build
from jaxformer.data.sources.tokenizers import NamedTokenizer, load_tokenizer, tokenizer_files
from jaxformer.errors import ConfigError
from jaxformer.evaluation.exams import Subject
from jaxformer.interop import huggingface
from jaxformer.interop.tensors import read_json
from jaxformer.parallel.mesh import make_mesh
from jaxformer.recipe import Recipe, TrainState
from jaxformer.storage.places import place
from jaxformer.train.checkpoint import Checkpoints, saved_steps
from jaxformer.train.states import first_data, restore_averaged


def run_config(workdir: str | Path, step: int | None = None) -> ConfigDict:
    """The config in a run's checkpoint (the newest by default): JSON, never executed."""
    steps = saved_steps(workdir)
    with Checkpoints(workdir) as checkpoints:
        return ConfigDict(checkpoints.meta(steps[-1] if step is None else step)["config"])


def open_run(workdir: str | Path, step: int | None = None) -> tuple[Recipe, Mesh]:
    """The recipe and the mesh of a run."""
    config = run_config(workdir, step)
    return build(config), make_mesh(config.mesh.to_dict())


def open_subject(
    path: str | Path,
    step: int | None = None,
    mesh: Mesh | None = None,
    recipe: Recipe | None = None,
) -> Subject:
    """The checkpoint at `path`: of a run, at `step` (the newest by default), or of a folder.

    A run that was not made from a config needs its `recipe`.

    Raises:
        ConfigError: there is none, or it cannot be read.
    """
    path = place(path)
    if huggingface.is_folder(path):
        if step is not None:
            raise ConfigError(f"steps: {path} is a Hugging Face folder, which has none; leave out")
        return _folder(path, mesh or make_mesh())
    if recipe is None:
        recipe, own = open_run(path, step)
        mesh = mesh or own
    mesh = mesh or make_mesh()
    step = saved_steps(path)[-1] if step is None else step
    phase, state = restore_averaged(recipe, path, step=step, mesh=mesh)
    data = first_data(recipe)
    fields = dict(recipe.config.get("data", {}))
    return Subject(
        name=path.name,
        step=step,
        task=recipe.task,
        state=state,
        mesh=mesh,
        row={} if data is None else data.spec(),
        evaluators=recipe.evaluators,
        phase=phase.name,
        workdir=path,
        length=_length(recipe.config),
        labels=_labels(recipe.config.get("huggingface", {})),
        pixels=(fields["mean"], fields["std"]) if "mean" in fields else None,
    )


def run_prompt(path: str | Path) -> str:
    """The prompt that a run's config samples from; that of a folder must be given."""
    config = {} if huggingface.is_folder(path) else run_config(path)
    if "sample" not in config:
        raise ConfigError(f"prompt: {path} has none of its own; give --prompt")
    return config["sample"]["prompt"]


def _folder(path: Path, mesh: Mesh) -> Subject:
    loaded = huggingface.load(path, mesh=mesh)
    tokenizer = folder_tokenizer(path, loaded.config)
    zero = jnp.zeros((), jnp.int32)
    state = TrainState(zero, loaded.params, {}, {}, jax.random.key(0))
    return Subject(
        name=path.name,
        step=0,
        task=loaded.port.make_task(tokenizer),
        state=state,
        mesh=mesh,
        row=loaded.port.batch,
        length=loaded.port.length,
        labels=_labels(loaded.config),
        pixels=pixel_statistics(path) if "image" in loaded.port.batch else None,
    )


def folder_tokenizer(path: Path, config: dict[str, Any]) -> NamedTokenizer | None:
    """The tokenizer of a Hugging Face folder, if it has one.

    Raises:
        ConfigError: it has more tokens than the model has embeddings.
    """
    if not tokenizer_files(path):
        return None
    found, size = load_tokenizer(str(path)).vocab_size, config.get("vocab_size")
    if isinstance(size, int) and found > size:
        raise ConfigError(
            f"{path}: its tokenizer has {found} tokens, the model embeds {size} (config.json: "
            "vocab_size); they do not belong together"
        )
    return NamedTokenizer(str(path))


def pixel_statistics(path: Path) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and deviation, in [0, 1], by which a folder wants its images normalised."""
    page = path / "preprocessor_config.json"
    fields = read_json(page) if page.is_file() else {}
    statistics = fields.get("image_mean", [0.5]), fields.get("image_std", [0.5])  # any channels
    for name, values in zip(("image_mean", "image_std"), statistics, strict=True):
        if not isinstance(values, list) or not all(isinstance(v, int | float) for v in values):
            raise ConfigError(f"{page}: {name!r} is {values!r}; must be a list of numbers")
    return statistics


def _length(config: Any) -> int | None:
    """The most tokens that the model of a config reads: what it has positions for."""
    if config.get("huggingface"):
        return huggingface.port_of(config["huggingface"], "config.huggingface").length
    return config.get("data", {}).get("length")


def _labels(config: Any) -> tuple[str, ...]:
    names = config.get("id2label") or {}
    return tuple(str(names[key]) for key in sorted(names, key=lambda key: int(key)))


def as_json(config: ConfigDict) -> dict[str, Any]:
    """A config as it stands in a checkpoint."""
    return json.loads(config.to_json())
