"""Verbs on checkpoints: measured, imported, exported, converted, sampled from."""

from __future__ import annotations

import argparse
from typing import Any

from jaxformer.errors import ConfigError


def evaluate(options: argparse.Namespace, _: Any) -> None:
    from jaxformer.evaluation.exams import ImageAccuracy, MultipleChoice, Perplexity
    from jaxformer.evaluation.report import text_table
    from jaxformer.evaluation.shots import InContext
    from jaxformer.interop.huggingface import is_folder
    from jaxformer.storage.places import place
    from jaxformer.tools.evaluate import evaluate, watch, write_results

    exams: list[Any] = []
    if options.text:
        exams.append(Perplexity(tuple(options.text), options.length, options.batch))
    if options.images:
        exams.append(ImageAccuracy(options.images, options.batch))
    if options.choices:
        exams.append(MultipleChoice(options.choices, options.batch))
    if options.few_shot:
        exams.append(InContext(options.few_shot))
    own = options.own or not exams
    first = place(options.checkpoints[0])
    folder = place(options.output or (f"runs/{first.name}" if is_folder(first) else first))
    if not options.watch:
        rows = evaluate(options.checkpoints, steps=options.steps, exams=exams, own=own)
        paths = write_results(rows, folder)
        print(text_table(rows))
        print(f"results: {', '.join(map(str, paths))}")
        return
    if len(options.checkpoints) > 1 or is_folder(first):
        raise ConfigError("watch: give the workdir of one run that is being trained")
    rows = []
    for row in watch(first, exams=exams, own=own, until=options.until):
        rows.append(row)
        write_results(rows, folder)
        print(text_table([row]), flush=True)


def import_(options: argparse.Namespace, overrides: dict[str, str]) -> None:
    from jaxformer.tools.convert import import_authors, import_folder

    if options.paper:
        fields = {name.replace(".", "__"): value for name, value in overrides.items()}
        how = {"config": options.config, **fields}
        print(import_authors(options.paper, options.source, options.workdir, **how))
        return
    if options.config or overrides:
        raise ConfigError("import: --config is for --paper; a folder brings its own")
    print(import_folder(options.source, options.workdir, dtype=options.dtype))


def export(options: argparse.Namespace, _: Any) -> None:
    from jaxformer.tools.convert import export

    how = {"steps": options.steps, "weights": options.weights, "dtype": options.dtype}
    print(export(options.run_folder, options.out, **how))


def convert(options: argparse.Namespace, _: Any) -> None:
    from jaxformer.evaluation.evaluators import select_steps
    from jaxformer.tools.convert import convert
    from jaxformer.tools.restack import restack
    from jaxformer.train.checkpoint import saved_steps

    how = {"steps": options.steps, "weights": options.weights, "dtype": options.dtype}
    if options.layers is None:
        print(convert(options.run_folder, options.out, **how))
        return
    if how != {"steps": options.steps, "weights": "averaged", "dtype": None}:
        raise ConfigError("layers: keeps the whole state; leave --weights and --dtype out")
    (step,) = select_steps(saved_steps(options.run_folder), options.steps)[-1:]
    print(restack(options.run_folder, options.out, options.layers, step))


def compress(options: argparse.Namespace, _: Any) -> None:
    from jaxformer.tools.compress import Plan, compress

    sweep = options.sweep.split(",") if options.sweep else ()
    names = ("calibration", "images", "examples", "outliers", "seconds")
    plan = Plan(
        tuple(options.method),
        tuple(tuple(chain.split("+")) for chain in sweep),
        **{name: getattr(options, name) for name in names},
    )
    page = compress(options.checkpoint, plan, options.out)
    print(page.read_text().split("\nCalibrated on")[0])
    print(f"report: {page}")


def sample(options: argparse.Namespace, _: Any) -> None:
    import jax

    from jaxformer.recipe import Denoises, Generates
    from jaxformer.sampling.autoregressive import generate
    from jaxformer.tools.subject import open_subject, run_prompt

    subject = open_subject(options.workdir, options.step)
    if isinstance(subject.task, Denoises):
        return _draw(options)
    if not isinstance(subject.task, Generates):
        raise ConfigError(
            f"sample: {subject.name} is neither a language model nor one that denoises"
        )
    prompts = options.prompt or [run_prompt(options.workdir)]

    if options.stream and len(prompts) > 1:
        raise ConfigError(f"stream: shows one text as it grows, got {len(prompts)} prompts")
    read: list[int] = []
    shown = ""

    def show(row: int, token: int) -> None:
        # All tokens are decoded anew: what one stands for depends on those before it, and a
        # character may need several.
        nonlocal shown
        read.append(token)
        text = subject.task.decode(read)  # type: ignore[attr-defined]
        if not text.endswith("\ufffd"):
            print(text[len(shown) :], end="", flush=True)
            shown = text

    if options.stream:
        print(prompts[0], end="")
    texts = generate(
        subject.task,
        subject.state.params,
        subject.state.extra,
        prompts,
        length=options.length,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        key=jax.random.key(options.seed),
        on_token=show if options.stream else None,
    )
    if options.stream:
        print(texts[0][len(shown) :])
        return
    for prompt, text in zip(prompts, texts, strict=True):
        print(prompt + text)


def _draw(options: argparse.Namespace) -> None:
    from jaxformer.tools.draw import draw_run

    changes = {name: getattr(options, name) for name in ("guidance", "steps", "rows", "columns")}
    print(
        draw_run(
            options.workdir,
            step=options.step,
            output=options.output,
            size=_numbers("size", options.size, "x", 2),
            labels=_numbers("labels", options.labels, ","),
            seed=options.seed,
            **changes,
        )
    )


def _numbers(flag: str, text: str | None, between: str, count: int | None = None) -> Any:
    """Whole numbers with `between` between them; one number counts as `count` equal ones."""
    if text is None:
        return None
    try:
        found = tuple(int(word) for word in text.split(between))
    except ValueError:
        found = ()
    if count and len(found) == 1:
        found *= count
    if not found or (count and len(found) != count):
        form = f"32 or 32{between}48" if count else f"0{between}1{between}2"
        raise ConfigError(f"{flag}={text!r}: must read like {form}")
    return found
