"""Models that another run was imported with."""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict

from jaxformer.errors import ConfigError
from jaxformer.train.checkpoint import Checkpoints, saved_steps


def adopt(config: ConfigDict) -> None:
    """Take over the description of the model that `init_from` was imported from, if it was."""
    if config.init_from and not config.huggingface:
        with config.unlocked():
            config.huggingface = ConfigDict(imported(config.init_from))


def imported(workdir: str) -> dict[str, Any]:
    """The `config.json` of an imported run; empty for others, or where there is none."""
    try:
        step = saved_steps(workdir)[-1]
    except ConfigError:
        return {}  # `fit` says so, unless it continues a run that began there
    with Checkpoints(workdir) as checkpoints:
        return checkpoints.meta(step)["config"].get("huggingface", {})
