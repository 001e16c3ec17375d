"""Config files: found, loaded with a preset, overridden. Imports no jax, so mistakes show at once.

A config file is Python: `PRESETS`, a tuple of names, and `get_config(preset) -> ConfigDict`. Its
field `paper` names the folder of `jaxformer.papers`, or the module of `jaxformer.baselines`, whose
`build(config)` makes the recipe.
"""

from __future__ import annotations

import ast
import difflib
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from jaxformer.errors import ConfigError

PACKAGE = Path(__file__).parent
CONFIG = ("PRESETS", "get_config")  # what a config file defines


def base(paper: str) -> ConfigDict:
    """The sections every config has; a paper's config adds `model`, `data` and its own."""
    return ConfigDict(
        {
            "paper": paper,
            "seed": 0,
            "steps": 100,
            "batch_size": 8,
            # sizes of the mesh axes; -1 takes the devices that are left
            "mesh": {"data": -1, "fsdp": 1, "sequence": 1, "tensor": 1, "expert": 1},
            "optim": {
                "name": "adamw",  # adamw | lamb | sgd | lion | signum | muon | schedule_free
                "learning_rate": 1e-3,
                "schedule": "cosine",  # constant | cosine | linear | rsqrt
                "warmup_steps": 0,
                "final": 0.0,  # last learning rate, as a fraction of the peak
                "weight_decay": 0.0,
                "clip": 1.0,  # of the global gradient norm; 0: none
                "offload": False,  # the optimiser's moments wait in the host's memory
            },
            "gradient": {"accumulate": 1, "ema": 0.0},  # micro-batches per step; EMA decay, 0: none
            "fit": {
                "log_every": 20,
                "checkpoint_every": 0,  # steps; 0: by time and at phase ends only
                "checkpoint_minutes": 10.0,
                "local_dir": "/tmp/jaxformer",  # on each host's own disk
                "local_every": 0,  # steps between copies there, a second tier; 0: none
                "keep": 3,
                "max_bad_steps": 20,
                "hang_minutes": 30.0,  # a process that stands still so long is ended; 0: never
                "tensorboard": False,
            },
            "evaluate": {"every": 0, "batches": 0},  # steps, 0: at the end; batches, 0: all
        }
    )


def configs_folder() -> Path:
    """Where the config files are: beside the package in a checkout, inside it when installed."""
    inside = PACKAGE / "configs"
    return inside if inside.is_dir() else PACKAGE.parent / "configs"


def papers() -> list[str]:
    """The papers there are: the folders of `jaxformer/papers`."""
    return sorted(p.parent.name for p in (PACKAGE / "papers").glob("*/__init__.py"))


def baselines() -> list[str]:
    """The plain models there are: the modules of `jaxformer/baselines`."""
    found = (PACKAGE / "baselines").glob("*.py")
    return sorted(p.stem for p in found if p.stem != "__init__")


def _find(spec: str) -> tuple[Path, str | None]:
    """The file and the preset of "configs/pfn.py:tiny", "pfn:tiny" or "pfn"."""
    name, _, preset = spec.partition(":")
    path = Path(name)
    if path.suffix != ".py":
        path = configs_folder() / f"{name}.py"
    if not path.is_file():
        known = ", ".join(p.stem for p in sorted(configs_folder().glob("*.py")))
        raise ConfigError(f"config: no file {name!r}; give a config file or one of: {known}")
    return path, preset or None


def _module(path: Path, *needed: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"jaxformer_config_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ConfigError(
            f"config: {path} cannot be run: {type(error).__name__}: {error}"
        ) from error
    if not all(hasattr(module, name) for name in needed):
        raise ConfigError(f"config: {path} must define {' and '.join(needed)}")
    return module


def load_mesh(name: str) -> tuple[dict[str, int], str | None]:
    """The overrides that set the mesh of `configs/mesh/<name>.py`, and the topology it is for.

    Raises:
        ConfigError: there is no such file.
    """
    folder = configs_folder() / "mesh"
    path = Path(name) if name.endswith(".py") else folder / f"{name}.py"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in folder.glob("*.py")))
        raise ConfigError(f"mesh: no file {name!r}; give a file or one of: {known}")
    module = _module(path, "MESH", "TOPOLOGY")
    sizes = {axis: 1 for axis in base("").mesh} | module.MESH
    return {f"mesh.{axis}": size for axis, size in sizes.items()}, module.TOPOLOGY


def presets(spec: str) -> tuple[str, ...]:
    """The presets of a config."""
    return tuple(_module(_find(spec)[0], *CONFIG).PRESETS)


def load_config(spec: str, overrides: Mapping[str, Any] | None = None) -> ConfigDict:
    """A locked config: `spec` is a config file or a paper, with ":preset" ("small" by default).

    `overrides` is {"model.width": 256, ...}; text is read as the type of the field.

    Raises:
        ConfigError: unknown file, preset or field, or a value of the wrong type.
    """
    path, preset = _find(spec)
    module = _module(path, *CONFIG)
    preset = preset or ("small" if "small" in module.PRESETS else module.PRESETS[0])
    if preset not in module.PRESETS:
        raise ConfigError(
            f"config: {path.name} has no preset {preset!r}; allowed: {', '.join(module.PRESETS)}"
        )
    config = module.get_config(preset)
    config.lock()
    for field, value in (overrides or {}).items():
        _set(config, field, value)
    return config


def _set(config: ConfigDict, field: str, value: Any) -> None:
    node: Any = config
    *parents, last = field.split(".")
    for depth, key in enumerate([*parents, last]):
        if not isinstance(node, ConfigDict) or key not in node:
            where = ".".join(["config", *field.split(".")[:depth]])
            allowed = list(node) if isinstance(node, ConfigDict) else []
            near = difflib.get_close_matches(key, allowed, 1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ConfigError(
                f"config.{field}: {where} has no field {key!r}; {hint}allowed: "
                f"{', '.join(sorted(allowed)) or 'none, it is a value'}"
            )
        node = node[key] if depth < len(parents) else node
    old = node[last]
    if isinstance(old, ConfigDict):
        raise ConfigError(f"config.{field}: is a section; set one of {', '.join(sorted(old))}")
    with node.ignore_type():
        node[last] = _read(field, value, old)


def _read(field: str, value: Any, old: Any) -> Any:
    """`value` as the type of `old`."""
    kind = type(old)
    if isinstance(value, str) and kind is not str:
        try:
            value = ast.literal_eval(value.capitalize() if kind is bool else value)
        except (ValueError, SyntaxError):
            value = value if old is None else object()
    if kind is float and type(value) is int:
        value = float(value)
    if kind is tuple and isinstance(value, list):
        value = tuple(value)
    if kind is float and getattr(value, "shape", None) == ():
        try:
            value = float(value)
        except TypeError:  # traced: the number of a member of a `Sweep`
            return value
    if old is not None and type(value) is not kind:
        raise ConfigError(f"config.{field}: needs {_article(kind.__name__)}, like {old!r}")
    return value


def _article(name: str) -> str:
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"
