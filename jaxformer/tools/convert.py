"""Checkpoints in and out: Hugging Face folders, safetensors, and other forms of a run."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from jaxformer import paths
from jaxformer.analyze.summary import parameter_count
from jaxformer.catalogue import build, paper_module
from jaxformer.config import load_config
from jaxformer.data.sources.tokenizers import save_bytes
from jaxformer.errors import ConfigError
from jaxformer.evaluation.evaluators import select_steps
from jaxformer.interop import huggingface
from jaxformer.interop.authors import Used
from jaxformer.interop.layout import place
from jaxformer.interop.tensors import (
    TensorFileError,
    Tensors,
    new_folder,
    open_tensors,
    read_json,
    save_tensors,
)
from jaxformer.parallel.mesh import make_mesh
from jaxformer.recipe import Recipe, TrainState
from jaxformer.tools.subject import as_json, folder_tokenizer, pixel_statistics, run_config
from jaxformer.train.checkpoint import saved_steps, versions
from jaxformer.train.states import abstract_states, initialise, restore, restore_averaged, start_run

PAGE = "jaxformer.json"  # beside the weights of an export: the config, and where they come from
TOKENIZER = "tokenizer"  # the folder of a run in which an imported model's tokenizer is kept


def import_folder(source: str | Path, workdir: str | Path, *, dtype: Any = None) -> Path:
    """Make a run of a Hugging Face folder, or of an export of jaxformer: `fit` goes on from it.

    Weights are stored in the type of the file unless `dtype` names another.

    Raises:
        ConfigError: the folder cannot be read, or `workdir` exists.
    """
    source, workdir = Path(source).expanduser(), Path(workdir)
    if (source / PAGE).is_file():
        page = read_json(source / PAGE)
        if not isinstance(page.get("config"), dict):
            raise TensorFileError(f"{source / PAGE}: has no 'config'; export the run again")
        recipe = build(ConfigDict(page["config"]))
        read = functools.partial(_read_own, open_tensors(source))
        return _new_run(recipe, workdir, read, dtype)
    if not huggingface.is_folder(source):
        raise ConfigError(
            f"import: {source} has neither {huggingface.CONFIG} nor {PAGE}; give a Hugging Face "
            "folder or what `jaxformer export` wrote"
        )
    config = pretrained_config(source, workdir)
    layout = huggingface.port_of(config.huggingface.to_dict()).layout
    tensors = open_tensors(source)

    def read_theirs(abstract: Any) -> Any:
        params = layout.read(tensors, abstract.params, dtype)
        return params, abstract.extra

    _new_run(build(config), workdir, read_theirs, dtype)
    keep_tokenizer(source, workdir)
    return workdir


def keep_tokenizer(source: Path, workdir: Path) -> None:
    """Copy the tokenizer of a Hugging Face folder, if it has one, to where its run looks for it."""
    if folder_tokenizer(source, read_json(source / huggingface.CONFIG)) is not None:
        (workdir / TOKENIZER).mkdir()
        huggingface.copy_tokenizer(source, workdir / TOKENIZER)


def import_authors(
    paper: str, file: str | Path, workdir: str | Path, *, config: str | None = None, **fields: Any
) -> Path:
    """Make a run of a paper's config from its authors' weights, by their names for them.

    `config` is "<paper>" or "<paper>:<preset>", `fields` its fields as `model__width=256`. Beside
    `read`, which gives the parameters, a paper's `authors` may have `read_extra` for what else a
    state holds, as batch statistics.

    Raises:
        ConfigError: the paper has no such mapping, or the weights are not of this config.
    """
    module = f"jaxformer.papers.{paper_module(paper).__name__.rpartition('.')[2]}.authors"
    found = importlib.util.find_spec(module)
    mapping = getattr(importlib.import_module(module), "read", None) if found else None
    mapping_extra = getattr(importlib.import_module(module), "read_extra", None) if found else None
    if mapping is None:
        raise ConfigError(
            f"import: {paper} has no mapping of its authors' weights to a whole model"
        )
    names = {name.replace("__", "."): value for name, value in fields.items()}
    chosen = load_config(config or paper, names)
    weights = Used(open_tensors(file))

    def read(abstract: TrainState) -> tuple[Any, Any]:
        params, extra = mapping(chosen, weights), abstract.extra
        ours, wanted = paths.leaves(params), paths.leaves(abstract.params)
        if mapping_extra is not None:
            extra = mapping_extra(chosen, weights)
            ours, wanted = ours | paths.leaves(extra), wanted | paths.leaves(abstract.extra)
        wrong = sorted(set(ours) ^ set(wanted)) or [
            name for name, x in ours.items() if x.shape != wanted[name].shape
        ]
        if wrong:
            name = wrong[0]
            shapes = [tuple(x[name].shape) if name in x else "nothing" for x in (ours, wanted)]
            raise TensorFileError(
                f"{file}: gives {shapes[0]} for parameter {name!r}, the config has {shapes[1]} "
                f"({len(wrong)} differ); set the config's fields to those the weights are of"
            )
        if weights.unused:
            raise TensorFileError(
                f"{file}: tensor {weights.unused[0]!r} is unknown to {paper} "
                f"({len(weights.unused)} are); does the config belong to these weights?"
            )
        return params, extra

    return _new_run(build(chosen), Path(workdir), read, None)


def pretrained_config(source: Path, workdir: Path) -> ConfigDict:
    """The config of baseline `pretrained` for the model in a folder."""
    page = read_json(source / huggingface.CONFIG)
    port = huggingface.port_of(page, str(source / huggingface.CONFIG))
    config = load_config("pretrained").copy_and_resolve_references()
    config.unlock()
    config.huggingface = ConfigDict(page)
    if folder_tokenizer(source, page) is not None:
        config.data.tokenizer = str(workdir / TOKENIZER)
    elif port.length is not None:
        config.data.tokenizer = ""
    if port.length is not None:
        config.data.length = min(port.length, 512)
    if "image" in port.batch:
        config.data.mean, config.data.std = map(tuple, pixel_statistics(source))
    return config


def _new_run(recipe: Recipe, workdir: Path, read: Any, dtype: Any) -> Path:
    """A run whose parameters `read(abstract state)` gives; nothing is left where that fails."""
    mesh = make_mesh(recipe.config.get("mesh"))
    abstract = abstract_states(recipe, mesh)[0]
    params, extra = read(abstract)
    key = jax.random.key(int(recipe.config.get("seed", 0)))
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(extra)):
        extra = initialise(recipe, mesh, 0).extra
    with new_folder(workdir) as folder:
        state = TrainState(jnp.zeros((), jnp.int32), cast(params, dtype), extra, {}, key)
        start_run(recipe, folder, state)
    return workdir


def _read_own(tensors: Tensors, abstract: TrainState) -> tuple[Any, Any]:
    """Parameters and extra variables by our own names."""
    wanted = paths.leaves({"params": abstract.params, "extra": abstract.extra})
    found = {}
    for name, leaf in wanted.items():
        if name not in tensors.names:
            raise TensorFileError(f"{tensors.where(tensors.names[0])}: lacks tensor {name!r}")
        if tensors.shape(name) != tuple(leaf.shape):
            raise TensorFileError(
                f"{tensors.where(name)}: tensor {name!r} has shape {tensors.shape(name)}, the "
                f"config makes it {tuple(leaf.shape)}"
            )
        found[name] = place(tensors.read(name), leaf)
    tree = paths.refill({"params": abstract.params, "extra": abstract.extra}, found)
    return tree["params"], tree["extra"]


def _weights(
    workdir: Path, steps: str, weights: str
) -> tuple[ConfigDict, Recipe, list[int], TrainState]:
    """A run's config, recipe, chosen steps, and the state of the last of them.

    Its parameters are the mean over the steps. `weights` "averaged" are those that evaluation uses
    (the EMA, where the run kept one), "raw" those that training goes on with.
    """
    if weights not in ("averaged", "raw"):
        raise ConfigError(f"weights: {weights!r}; must be 'averaged' or 'raw'")
    config = run_config(workdir)
    chosen = select_steps(saved_steps(workdir), steps)
    recipe, mesh = build(config), make_mesh(config.mesh.to_dict())

    def read(step: int) -> TrainState:
        if weights == "raw":
            return restore(recipe, workdir, step=step, mesh=mesh)
        return restore_averaged(recipe, workdir, step=step, mesh=mesh)[1]

    state = read(chosen[-1])
    if len(chosen) > 1:
        total = jax.tree.map(lambda x: x.astype(jnp.float32), state.params)
        for step in chosen[:-1]:
            total = jax.tree.map(lambda a, b: a + b.astype(jnp.float32), total, read(step).params)
        mean = jax.tree.map(lambda a, x: (a / len(chosen)).astype(x.dtype), total, state.params)
        state = state.replace(params=mean)
    return config, recipe, chosen, state


def cast(params: Any, dtype: Any) -> Any:
    """Floating-point leaves in `dtype`; as they are where it is None."""
    if dtype is None:
        return params

    def one(x: jax.Array) -> jax.Array:
        return x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x

    return jax.tree.map(one, params)


def export(
    workdir: str | Path,
    out: str | Path,
    *,
    steps: str = "last",
    weights: str = "averaged",
    dtype: Any = None,
) -> Path:
    """Write a run's weights as safetensors, with its config and a model card, into a new folder.

    An imported model becomes a Hugging Face folder that `transformers` loads, any other run, and
    any that was compressed, a folder that `import_folder` reads, packed weights as they are.
    Several `steps` are averaged.
    """
    workdir, out = Path(workdir), Path(out)
    config, recipe, chosen, state = _weights(workdir, steps, weights)
    params = cast(state.params, dtype)
    card = model_card(recipe, workdir, chosen, weights, params)
    # No other program reads packed weights, or knows what becomes of activations and tokens.
    if config.get("huggingface") and "compressed" not in config:
        page = config.huggingface.to_dict()
        with tempfile.TemporaryDirectory() as made:
            files = workdir / TOKENIZER
            if config.data.tokenizer == "bytes":
                files = Path(made)
                save_bytes(files / "tokenizer.json")
            huggingface.save(out, page, params, files=files, card=card)
        return out
    page = {
        "config": as_json(config),
        "steps": chosen,
        "weights": weights,
        "versions": versions(),
    }
    kept = {"params": params, "extra": _shared_extra(recipe, state)}
    with new_folder(out) as folder:
        arrays = ((name, np.asarray(x)) for name, x in paths.leaves(kept).items())
        save_tensors(folder, arrays, metadata={"format": "jaxformer"})
        (folder / PAGE).write_text(json.dumps(page, indent=2) + "\n")
        (folder / "README.md").write_text(card)
    return out


def _shared_extra(recipe: Recipe, state: TrainState) -> Any:
    """The variables that belong to the model, not to an update (batch statistics, not an EMA)."""
    wanted = abstract_states(recipe, make_mesh(recipe.config.get("mesh")))[0].extra
    return {name: state.extra[name] for name in wanted if name in state.extra}


def convert(
    workdir: str | Path,
    out: str | Path,
    *,
    steps: str = "last",
    weights: str = "averaged",
    dtype: Any = None,
) -> Path:
    """A new run that starts from the weights of another, averaged over steps or cast."""
    _, recipe, _, state = _weights(Path(workdir), steps, weights)
    with new_folder(out) as folder:
        params, zero = cast(state.params, dtype), jnp.zeros((), jnp.int32)
        extra = _shared_extra(recipe, state)
        start_run(recipe, folder, TrainState(zero, params, extra, {}, state.key))
    return Path(out)


def model_card(
    recipe: Recipe, workdir: Path, steps: Sequence[int], weights: str, params: Any
) -> str:
    """What these weights are and where they come from, in Markdown."""
    config = recipe.config
    types = sorted({str(x.dtype) for x in jax.tree.leaves(params)})
    base = config.get("huggingface", {}).get("_name_or_path") or ""
    facts = {
        "model": config.get("paper", ""),
        **({"architecture": config["huggingface"]["architectures"][0]} if base else {}),
        **({"imported from": base} if base else {}),
        "run": workdir.name,
        "steps": ", ".join(map(str, steps)) + (" (averaged)" if len(steps) > 1 else ""),
        "weights": weights,
        "parameters": f"{parameter_count(params):,} in {', '.join(types)}",
        "written by": ", ".join(f"{name} {version}" for name, version in versions().items()),
    }
    lines = ["# " + str(config.get("paper", "model")), "", "| | |", "| --- | --- |"]
    lines += [f"| {name} | {value} |" for name, value in facts.items()]
    measured = workdir / "evaluation.json"
    if measured.is_file():
        lines += ["", "## Measured", "", "```json", measured.read_text().strip(), "```"]
    lines += ["", "## Config", "", "```json", json.dumps(config, indent=2), "```", ""]
    return "\n".join(lines)
