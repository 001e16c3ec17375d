"""Examples drawn from a run that `Denoises`, written as a grid of pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from etils import epath

from jaxformer.catalogue import build
from jaxformer.errors import ConfigError
from jaxformer.evaluation.pictures import write_examples
from jaxformer.recipe import Denoises, Recipe, TrainState
from jaxformer.sampling.diffusion import named_sampler, sample
from jaxformer.storage.places import place
from jaxformer.tools.subject import open_subject, run_config
from jaxformer.train.states import first_data, on_device

FILE = "samples.png"


def latent_shape(recipe: Recipe) -> tuple[int, ...]:
    """That of one example as the network sees it, from the shapes of the recipe's data."""
    data, codec = first_data(recipe), recipe.task.codec  # type: ignore[attr-defined]
    assert data is not None

    def encode(batch: Any, keys: jax.Array) -> jax.Array:
        return codec.encode({}, on_device(data, batch)["image"], keys)

    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), data.batch_size))
    return jax.eval_shape(encode, data.spec(), keys).shape[1:]


def draw(
    recipe: Recipe,
    state: TrainState,
    path: Any,
    *,
    key: jax.Array,
    labels: Sequence[int] | None = None,
    **changes: Any,
) -> epath.Path:
    """Draw what the config's section `sample` says, with `changes`, and write it to `path`.

    `labels` are the classes of the columns; all of them, one after another, when None.

    Raises:
        ConfigError: the run has no such section, or a value in it is not allowed.
    """
    if "sample" not in recipe.config:
        raise ConfigError("sample: the run's config has no section of that name")
    changed = {name: value for name, value in changes.items() if value is not None}
    rule: Mapping[str, Any] = {**recipe.config["sample"], **changed}
    rows, columns = rule["rows"], rule["columns"]
    if rows < 1 or columns < 1:
        raise ConfigError(f"sample.rows={rows}, sample.columns={columns}: must be at least 1")
    task: Any = recipe.task
    given = task.examples(columns) if labels is None else {"label": _cycle(labels, columns)}
    images = sample(
        task,
        state.params,
        state.extra,
        {name: [x for _ in range(rows) for x in value] for name, value in given.items()},
        shape=latent_shape(recipe),
        sampler=named_sampler(rule["sampler"], rule["steps"]),
        key=key,
        rows=rows * columns,
        guidance=rule["guidance"],
        guided_channels=rule["guided_channels"] or None,
    )
    return write_examples(images, columns, path)


def _cycle(labels: Sequence[int], count: int) -> list[int]:
    return [labels[i % len(labels)] for i in range(count)]


def draw_run(
    workdir: str | Path,
    *,
    step: int | None = None,
    output: str | None = None,
    size: tuple[int, int] | None = None,
    labels: Sequence[int] | None = None,
    seed: int = 0,
    **changes: Any,
) -> epath.Path:
    """The same of a checkpoint; `size` (height, width) may be another one than trained on.

    Raises:
        ConfigError: the run does not `Denoise`, or its config has no size.
    """
    config = run_config(workdir, step)
    if size is not None:
        if not {"height", "width"} <= set(config.get("data", {})):
            raise ConfigError(f"size: the config of {workdir} has no data.height and data.width")
        config.data.update({"height": size[0], "width": size[1]})
    recipe = build(config)
    if not isinstance(recipe.task, Denoises):
        raise ConfigError(f"sample: {workdir} holds no run that denoises")
    subject = open_subject(workdir, step, recipe=recipe)
    path = output or place(workdir) / FILE
    with jax.set_mesh(subject.mesh):
        key = jax.random.key(seed)
        return draw(recipe, subject.state, path, key=key, labels=labels, **changes)
