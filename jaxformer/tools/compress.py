"""A checkpoint made smaller by a chain of methods, and what each of them costs and saves."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from jaxformer import paths
from jaxformer.catalogue import build, compressor_of
from jaxformer.compress.compressor import HasModel, check_same, check_unpacked
from jaxformer.compress.outliers import at_norms, draw_channels
from jaxformer.data.base import IndexedData
from jaxformer.errors import ConfigError
from jaxformer.evaluation.evaluators import MeanEvaluator
from jaxformer.evaluation.exams import ImageAccuracy, Subject, image_epoch
from jaxformer.evaluation.report import markdown_table
from jaxformer.interop import huggingface
from jaxformer.parallel.mesh import make_mesh
from jaxformer.recipe import Batch, Data, Predicts, Recipe, TrainState
from jaxformer.storage.places import place
from jaxformer.tasks.staged import StagedTask
from jaxformer.tools.convert import cast, keep_tokenizer, pretrained_config
from jaxformer.tools.subject import as_json, open_subject, run_config
from jaxformer.tools.tradeoffs import Model, Row, measure, pareto
from jaxformer.train.states import first_data, on_device, start_run

FACTOR = 20.0  # of outliers


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is done to a checkpoint: a chain of `methods`, which is saved, and chains to compare.

    `calibration` and `images` name images as `evaluate --images` does, to look at `examples` of and
    to test on; by default they are the run's own. `outliers` channels of every norm become large
    first, which changes nothing but what quantisers make of it. Models race for `seconds` at most.

    Raises:
        ConfigError: nothing is to be done, or a method is unknown.
    """

    methods: tuple[str, ...] = ()
    sweep: tuple[tuple[str, ...], ...] = ()
    calibration: str | None = None
    images: str | None = None
    examples: int = 32
    outliers: int = 0
    seconds: float = 30.0

    def __post_init__(self) -> None:
        if not self.methods and not self.sweep:
            raise ConfigError("method: give at least one --method, or a --sweep")
        if self.examples < 1:
            raise ConfigError(f"examples={self.examples}: give at least one to calibrate on")
        for method in (*self.methods, *itertools.chain(*self.sweep)):
            compressor_of(method)


# ------------------------------------------------------------------------------------ the original


@dataclasses.dataclass(frozen=True)
class Original:
    """What is compressed: its config, the run's or what `import` would make, and its model."""

    config: ConfigDict
    recipe: Recipe
    subject: Subject
    stage: int | None  # of a `StagedTask`
    model: Model
    folder: Path | None  # of Hugging Face

    @classmethod
    def open(cls, checkpoint: str | Path, out: Path) -> Original:
        """A run, its newest checkpoint, or a Hugging Face folder.

        Raises:
            ConfigError: it cannot be read, or has no one model that predicts.
        """
        path = place(checkpoint)
        folder = Path(path) if huggingface.is_folder(path) else None
        config = run_config(path) if folder is None else pretrained_config(folder, out)
        recipe = build(config)
        mesh = make_mesh({"data": 1}, jax.devices()[:1])  # layers are walked, and times compared
        subject = open_subject(path, mesh=mesh, recipe=recipe if folder is None else None)
        params, extra = cast(subject.state.params, jnp.float32), subject.state.extra
        task: Any = recipe.task
        stage = config.compressed.stage if "compressed" in config else None
        if isinstance(task, StagedTask):
            rows = jax.tree.map(lambda x: np.zeros((1, *x.shape[1:]), x.dtype), subject.row)
            stage = task.stages.index(task.of(params, extra, rows))
            task = task.stages[stage]
        if not isinstance(task, Predicts) or not isinstance(task, HasModel):
            raise ConfigError(
                f"checkpoint: {subject.name} is scored by {type(task).__name__}, which has no one "
                "model that predicts; give a classifier or a language model"
            )
        abstract = jax.eval_shape(lambda b: task.init(jax.random.key(0), b), subject.row)
        extra = {name: extra[name] for name in abstract[1]}  # without averages of weights
        links = tuple(as_json(config)["compressed"]["links"]) if "compressed" in config else ()
        model = Model("original", task, params, extra, links)
        subject = dataclasses.replace(subject, task=task)
        return cls(config, recipe, subject, stage, model, folder)

    def examples(self, where: str | None, least: int) -> Batch:
        """So many examples to calibrate on: of the images named, or of the run's training data."""
        data: Data | None = None
        if where is not None:
            epoch = image_epoch(self.subject, where, least, "train")
            data = IndexedData(epoch.source, least, transforms=epoch.transforms)  # of all classes
        elif self.folder is None:
            data = first_data(self.recipe)
        if data is None:
            raise ConfigError(
                f"calibration: {self.subject.name} has no training data of its own; name images by "
                "--calibration"
            )
        taken = range(-(-least // data.batch_size))
        batches = [on_device(data, data.batch(k)) for k in taken]  # the first, as in training
        first = jax.tree.map(lambda *x: jnp.concatenate(x)[:least], *batches)
        return {name: x for name, x in first.items() if name != "weight"}

    def evaluator(self, images: str | None) -> MeanEvaluator:
        """How models are tested: on the images named, or as the run tests itself."""
        if images is not None:
            return ImageAccuracy(images).of(self.subject)  # type: ignore[return-value]
        for found in self.recipe.evaluators if self.folder is None else ():
            if isinstance(found, MeanEvaluator) and found.task == self.recipe.task:
                return found
        raise ConfigError(
            f"images: {self.subject.name} has no test data of its own; name images by --images"
        )


def with_outliers(model: Model, count: int, batch: Batch) -> Model:
    """The model with so many large channels in every norm.

    Raises:
        ConfigError: its norms are not those of pre-norm blocks alone, or its weights are packed.
    """
    check_unpacked(model.params)
    norms = (x for n, x in paths.leaves(model.params).items() if n.endswith("_residual/norm/scale"))
    channels = draw_channels(len(next(norms, ())), count)
    params = at_norms(model.params, channels, FACTOR)
    check_same(model.task, model.params, params, model.extra, batch)
    return dataclasses.replace(model, params=params, name=f"original, {count} outliers")


def compress(checkpoint: str | Path, plan: Plan, out: str | Path) -> Path:
    """Compress, measure, write; the path of the page.

    `out` becomes a run of the compressed model, if there is a chain of methods, with `report.md`,
    `result.json` and `pareto.png` beside it.

    Raises:
        ConfigError: the checkpoint, the data or a method do not go together, or `out` holds a run.
    """
    out = Path(out)
    if (out / "checkpoints").exists():
        raise ConfigError(f"out: {out} holds a run already; give a new folder")
    original = Original.open(checkpoint, out)
    batch = original.examples(plan.calibration, plan.examples)
    evaluator = original.evaluator(plan.images)
    start = original.model
    with jax.set_mesh(original.subject.mesh):
        if plan.outliers:
            start = with_outliers(start, plan.outliers, batch)
        chain = start.chain(plan.methods, batch)
        points = [start.chain(methods, batch)[-1] for methods in plan.sweep]
        rows = measure([start, *chain, *points], evaluator, plan.seconds)
    out.mkdir(parents=True, exist_ok=True)
    size = save(original, chain[-1], out) if chain else None
    pareto(rows, out / "pareto.png")
    found = {"checkpoint": str(checkpoint), "plan": dataclasses.asdict(plan), "models": rows}
    found |= {"bytes on disk": size}
    (out / "result.json").write_text(json.dumps(found, indent=1) + "\n")
    page = out / "report.md"
    page.write_text(report(original, plan, rows, size))
    return page


def save(original: Original, model: Model, out: Path) -> int:
    """A run of the compressed model, of the original's config and what was found; its bytes."""
    config = original.config.copy_and_resolve_references()
    config.unlock()
    config.compressed = {"stage": original.stage, "links": list(model.links)}
    zero = jnp.zeros((), jnp.int32)
    state = TrainState(zero, model.params, model.extra, {}, jax.random.key(0))
    start_run(build(config), out, state)
    if original.folder is not None:
        keep_tokenizer(original.folder, out)
    return sum(file.stat().st_size for file in (out / "checkpoints").rglob("*") if file.is_file())


def report(original: Original, plan: Plan, rows: Sequence[Row], size: int | None) -> str:
    """The page, in Markdown."""
    images = plan.images or "the run's own test data"
    looked = plan.calibration or "the run's own training data"
    chain = rows[: len(plan.methods) + 1]
    swept = [rows[0], *rows[len(plan.methods) + 1 :]]
    text = [f"# {original.subject.name}, compressed", ""]
    if len(chain) > 1:
        text += ["Each method on what the one before has left.", "", markdown_table(chain), ""]
    if len(swept) > 1:
        text += ["## Settings", "", markdown_table(swept), ""]
    text += [
        f"Calibrated on {plan.examples} examples of {looked}; tested on {images}. Agreement is the "
        "share of answers that are the original's. Bytes are of all arrays of a model, packed as "
        "they are saved. Products are counted (MFLOP of an example); times are measured, of a "
        "test batch, the models taking turns, and the original's speed is 1.",
        "",
        *[f"- {row['model']}: {row['note']}." for row in rows if row["note"]],
        "",
    ]
    if size is not None:
        text += [
            f"The checkpoint takes {size:,} bytes on disk: {chain[-1]['bytes']:,} of arrays, and "
            "about a thousand for the name, shape and checksum of each array.",
            "",
        ]
    text += [
        "![accuracy over bytes and FLOPs](pareto.png)",
    ]
    return "\n".join(text) + "\n"
