"""The command line. Verbs import what they need, so that mistakes and lists show without jax."""

from __future__ import annotations

import argparse
import ast
import errno
import json
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from jaxformer import launchers
from jaxformer.errors import STOPPED, ConfigError

DEFAULT = "flowformer:small"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (see {self.prog} --help)")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; 0 done, 1 a claim not met or a run that failed, 2 wrong input, 75 stopped."""
    try:
        options, rest = _parser().parse_known_args(arguments)
        overrides = _overrides(rest) if hasattr(options, "config") else {}
        if rest and not hasattr(options, "config"):
            raise ConfigError(f"{options.verb}: unknown argument {rest[0]!r}")
        return int(options.run(options, overrides) or 0)
    except ConfigError as error:
        return _alone(_fail(error, 2))
    except Exception as error:
        return _unfinished(error)


def _unfinished(error: Exception) -> int:
    """The exit code of a run that did not end as it should; raises what nobody expects."""
    from jaxformer.parallel.multihost import PeersLost, leave, lost
    from jaxformer.storage.digest import CheckpointDamaged
    from jaxformer.storage.failures import CheckpointFailed
    from jaxformer.train.fit import Interrupted, NonFiniteError

    gone = error if isinstance(error, PeersLost) else lost(error)
    if gone is not None:
        leave(_fail(gone, STOPPED))
    if isinstance(error, Interrupted):
        return _fail(error, STOPPED)
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    if isinstance(error, CheckpointFailed):
        leave(_fail(error, 1))  # a normal exit says again what is left of the write
    if full or isinstance(error, NonFiniteError | CheckpointDamaged):
        return _alone(_fail(error, 1))
    if "jax" in sys.modules and sys.modules["jax"].distributed.is_initialized():
        traceback.print_exception(error)
        return _alone(1)
    raise error


def _alone(code: int) -> int:
    """The exit code; one of several processes leaves here, as a normal exit waits for the rest."""
    if "jax" in sys.modules and sys.modules["jax"].distributed.is_initialized():
        from jaxformer.parallel.multihost import leave

        leave(code)
    return code


def _fail(error: Exception, code: int) -> int:
    print(f"jaxformer: {' '.join(str(error).split())}", file=sys.stderr)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="jaxformer", description="Research transformers in JAX.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="verb", parser_class=_Parser)

    def verb(name: str, run: Any, text: str) -> argparse.ArgumentParser:
        sub = verbs.add_parser(name, help=text, description=text, allow_abbrev=False)
        sub.set_defaults(run=run)
        return sub

    sub = verb("list", _list, "the papers, their configs and presets")
    form = sub.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true")
    form.add_argument("--markdown", action="store_true")

    sub = verb("train", _train, "train a config; set its fields with --config.<field>=<value>")
    sub.add_argument("--config", default=DEFAULT, help="file or paper, with :preset")
    sub.add_argument("--mesh", help="a file of configs/mesh, such as v5e_256")
    sub.add_argument("--workdir", help="default: runs/<paper>-<preset>")
    sub.add_argument("--stop-after", type=int, metavar="STEP", help="save and leave at this step")
    sub.add_argument("--profile", metavar="steps=10..15", help="write an xprof trace of these")

    sub = verb("multihost", _multihost, "run a verb as several processes on this machine")
    sub.add_argument("--processes", type=int, required=True)
    sub.add_argument("--devices", type=int, default=1, help="simulated devices of each, on a CPU")
    sub.add_argument("--restarts", type=int, default=0, help="start again if one stops or dies")
    sub.add_argument("command", nargs=argparse.REMAINDER, help="-- train --config ...")

    sub = verb("launch", _launch, "hand a run to a cluster's scheduler: files, and the command")
    launchers.add_arguments(sub)

    sub = verb("soak", _soak, "hit a small run with every fault, and kill -9 until time is up")
    sub.add_argument("--minutes", type=float, default=20.0)
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--output", default="results/soak.json", help="a session is added to it")
    sub.add_argument("--kills-only", action="store_true", help="leave out the other faults")

    sub = verb("show", _show, "what a config is: phases, parameters, sharding, FLOPs, memory")
    sub.add_argument("config", help="file or paper, with :preset")

    sub = verb("plan", _plan, "compile a config's step for a pod that is not here: does it fit")
    sub.add_argument("--config", default=DEFAULT, help="file or paper, with :preset")
    sub.add_argument("--mesh", help="a file of configs/mesh, such as v5e_256")
    sub.add_argument("--topology", help="v5e:16x16, v5p:8x8x16, h200:8x8, ...; default: the mesh's")
    sub.add_argument("--search", action="store_true", help="find the largest micro-batch")
    sub.add_argument("--json", action="store_true", help="plain numbers: bytes, FLOPs, seconds")

    sub = verb("evaluate", _evaluate, "measure checkpoints, one or many, side by side")
    sub.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT", help="run or folder")
    sub.add_argument("--steps", default="last", help="last, all, N or N:M")
    sub.add_argument("--text", action="append", help="a glob of text files: perplexity")
    sub.add_argument("--images", help="folder of classes, TFDS folder:split, or digits: accuracy")
    sub.add_argument("--choices", help='lines {"question", "choices", "answer"}: accuracy')
    sub.add_argument("--own", action="store_true", help="the run's evaluators beside the exams")
    sub.add_argument("--length", type=int, help="tokens of a window of text")
    sub.add_argument("--batch", type=int, help="rows; default: as many as fit, at most 32")
    sub.add_argument("--watch", action="store_true", help="each new checkpoint as it is written")
    sub.add_argument("--until", type=int, metavar="STEP", help="watch: the last one to wait for")
    sub.add_argument("--output", help="folder of the results; default: the first checkpoint's run")

    sub = verb("import", _import, "make a run of a Hugging Face folder, an export, authors' files")
    sub.add_argument("source", help="folder, or with --paper a file of tensors")
    sub.add_argument("--paper", help="the paper whose authors' weights these are")
    sub.add_argument("--config", help="with --paper: its config, such as pfn:paper")
    sub.add_argument("--workdir", required=True)
    sub.add_argument("--dtype", choices=("float32", "bfloat16", "float16"))

    for name, run, text in (
        ("export", _export, "write a run's weights as safetensors, with config and model card"),
        ("convert", _convert, "make a run of another's weights: averaged, cast, stacked"),
    ):
        sub = verb(name, run, text)
        sub.add_argument("run_folder", metavar="RUN")
        sub.add_argument("out", metavar="OUT", help="a new folder")
        sub.add_argument("--steps", default="last", help="last, all, N or N:M; several: their mean")
        sub.add_argument("--weights", choices=("averaged", "raw"), default="averaged")
        sub.add_argument("--dtype", choices=("float32", "bfloat16", "float16"))
        if name == "convert":
            sub.add_argument("--layers", choices=("stacked", "unrolled"))

    sub = verb("restack", _restack, "a run's layers as a loop, or unrolled again: model.scan")
    sub.add_argument("--workdir", required=True)
    sub.add_argument("--to", required=True, help="a new folder, in which the run continues")
    sub.add_argument("--step", type=int, help="default: the last")

    sub = verb("sample", _sample, "continue a prompt with a trained model")
    sub.add_argument("--workdir", required=True)
    sub.add_argument("--step", type=int)
    sub.add_argument("--prompt", action="append", help="may be given several times")
    sub.add_argument("--length", type=int, default=200)
    sub.add_argument("--temperature", type=float, default=0.8)
    sub.add_argument("--top-k", type=int)
    sub.add_argument("--top-p", type=float)
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--stream", action="store_true", help="print tokens as they come")

    sub = verb("reproduce", _reproduce, "measure the claims of a paper")
    sub.add_argument("paper", help="a paper, or all")
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--workdir", help="default: runs/reproduce/<paper>-<seed>")

    sub = verb("bench", _bench, "measure this machine: ratios within one run")
    sub.add_argument("what", choices=("loop", "attention", "data", "checkpoint", "h200"))
    sub.add_argument("--out", help="h200: folder of the results (bench)")
    sub.add_argument("--stage", help="h200: numerics, peak, forward, ... (all)")
    sub.add_argument("--minutes", type=float, help="h200: time limit of a stage (7)")
    sub.add_argument("--tiny", action="store_true", help="h200: in miniature, on any machine")
    return parser


def _overrides(rest: Sequence[str]) -> dict[str, str]:
    """{"model.width": "256"} of --config.model.width=256 (or with a space)."""
    found: dict[str, str] = {}
    items = iter(rest)
    for item in items:
        name, equals, value = item.partition("=")
        if not name.startswith("--config."):
            raise ConfigError(
                f"unknown argument {item!r}; fields are set by --config.<field>=<value>"
            )
        if not equals:
            value = next(items, "")
            if not value:
                raise ConfigError(f"{name}: needs a value")
        found[name.removeprefix("--config.")] = value
    return found


def _list(options: argparse.Namespace, _: Any) -> None:
    from jaxformer.config import PACKAGE, papers, presets

    rows = []
    for slug in papers():
        text = (PACKAGE / "papers" / slug / "__init__.py").read_text()
        title = (ast.get_docstring(ast.parse(text)) or "").split("\n")[0]
        rows.append({"paper": slug, "presets": list(presets(slug)), "title": title})
    if options.json:
        print(json.dumps(rows, indent=2))
        return
    if options.markdown:
        print("| paper | what it is | presets |\n| --- | --- | --- |")
    for row in rows:
        slug, names, title = row["paper"], ", ".join(row["presets"]), row["title"]
        if options.markdown:
            print(f"| [`{slug}`](jaxformer/papers/{slug}) | {title} | {names} |")
        else:
            print(f"{slug:<20} {names:<22} {title}")


def _on_mesh(options: argparse.Namespace, overrides: dict[str, str]) -> tuple[dict, str | None]:
    """The overrides with those of --mesh before them, and its topology."""
    from jaxformer.config import load_mesh

    sizes, topology = load_mesh(options.mesh) if options.mesh else ({}, None)
    return {**sizes, **overrides}, topology


def _train(options: argparse.Namespace, overrides: dict[str, str]) -> None:
    from jaxformer.config import load_config

    config = load_config(options.config, _on_mesh(options, overrides)[0])
    import jax

    from jaxformer.analyze.summary import parameter_count
    from jaxformer.catalogue import build
    from jaxformer.evaluation.goodput import goodput
    from jaxformer.evaluation.report import training_report
    from jaxformer.parallel import multihost
    from jaxformer.parallel.mesh import make_mesh
    from jaxformer.parallel.trace import traced_steps
    from jaxformer.recipe import Generates
    from jaxformer.train.fit import FitOptions, fit
    from jaxformer.train.states import restore_averaged

    how = {"profile": traced_steps(options.profile) if options.profile else None}
    workdir = options.workdir or f"runs/{_label(options.config)}"
    multihost.start()
    recipe = build(config)
    mesh = make_mesh(config.mesh.to_dict())
    settings = FitOptions(seed=config.seed, stop_after=options.stop_after, **how, **config.fit)
    fit(recipe, workdir=workdir, mesh=mesh, options=settings)
    if jax.process_index() == 0:
        print(f"goodput: {goodput(workdir)}", file=sys.stderr)
    _, state = restore_averaged(recipe, workdir, mesh=mesh)
    samples: list[str] = []
    if isinstance(recipe.task, Generates) and "sample" in config:
        from jaxformer.sampling.autoregressive import generate

        prompt = config.sample.prompt
        with jax.set_mesh(mesh):  # all processes draw together, each with its part of the weights
            (text,) = generate(
                recipe.task,
                state.params,
                state.extra,
                [prompt],
                length=config.sample.length,
                temperature=config.sample.temperature,
                key=state.key,
            )
        samples = [prompt + text]
    count = parameter_count(state.params)
    if jax.process_index() == 0:
        print(training_report(recipe, workdir, parameters=count, samples=samples))
    multihost.finish()


def _multihost(options: argparse.Namespace, _: Any) -> int:
    from jaxformer.parallel.loopback import run

    command = [word for word in options.command if word != "--"]
    if not command or options.processes < 1:
        raise ConfigError("multihost: give --processes N -- VERB ..., such as -- train")
    return run(command, options.processes, options.devices, options.restarts)


def _launch(options: argparse.Namespace, overrides: dict[str, str]) -> None:
    launchers.launch(options, overrides)


def _soak(options: argparse.Namespace, _: Any) -> int:
    from jaxformer.soak import soak

    output = Path(options.output)
    return 0 if soak(options.minutes, options.seed, output, options.kills_only) else 1


def _label(spec: str) -> str:
    name, _, preset = spec.partition(":")
    return f"{Path(name).stem}-{preset or 'small'}"


def _show(options: argparse.Namespace, overrides: dict[str, str]) -> None:
    from jaxformer.config import load_config

    config = load_config(options.config, overrides)
    from jaxformer.analyze.summary import describe
    from jaxformer.catalogue import build
    from jaxformer.parallel.mesh import make_mesh

    print(describe(build(config), make_mesh(config.mesh.to_dict())))


def _plan(options: argparse.Namespace, overrides: Any) -> int:
    from jaxformer.config import load_config

    overrides, topology = _on_mesh(options, overrides)
    topology = options.topology or topology
    if topology is None:
        raise ConfigError("plan: give --topology, or a --mesh that is for one")
    load_config(options.config, overrides)  # mistakes show before jax is imported
    from jaxformer.analyze.plan import plan
    from jaxformer.catalogue import build

    def load(spec: str, **changes: Any) -> Any:
        return build(load_config(spec, {**overrides, **changes}))

    found = plan(options.config, load, topology, options.search)
    print(json.dumps(found.json(), indent=1) if options.json else found.text())
    return 0 if found.fits else 1


def _evaluate(options: argparse.Namespace, _: Any) -> None:
    from jaxformer.evaluation.exams import ImageAccuracy, MultipleChoice, Perplexity
    from jaxformer.evaluation.report import text_table
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


def _import(options: argparse.Namespace, overrides: dict[str, str]) -> None:
    from jaxformer.tools.convert import import_authors, import_folder

    if options.paper:
        fields = {name.replace(".", "__"): value for name, value in overrides.items()}
        how = {"config": options.config, **fields}
        print(import_authors(options.paper, options.source, options.workdir, **how))
        return
    if options.config or overrides:
        raise ConfigError("import: --config is for --paper; a folder brings its own")
    print(import_folder(options.source, options.workdir, dtype=options.dtype))


def _export(options: argparse.Namespace, _: Any) -> None:
    from jaxformer.tools.convert import export

    how = {"steps": options.steps, "weights": options.weights, "dtype": options.dtype}
    print(export(options.run_folder, options.out, **how))


def _convert(options: argparse.Namespace, _: Any) -> None:
    from jaxformer.tools.convert import convert

    how = {"steps": options.steps, "weights": options.weights, "dtype": options.dtype}
    print(convert(options.run_folder, options.out, layers=options.layers, **how))


def _restack(options: argparse.Namespace, _: Any) -> None:
    from jaxformer.analyze.restack import restack
    from jaxformer.catalogue import build

    step, scan = restack(options.workdir, options.to, build, options.step)
    print(f"{options.to}: step {step}; continue with --config.model.scan={str(scan).lower()}")


def _sample(options: argparse.Namespace, _: Any) -> None:
    import jax

    from jaxformer.recipe import Generates
    from jaxformer.sampling.autoregressive import generate
    from jaxformer.tools.subject import open_subject, run_prompt

    subject = open_subject(options.workdir, options.step)
    if not isinstance(subject.task, Generates):
        raise ConfigError(f"sample: {subject.name} is no language model; it cannot generate")
    prompts = options.prompt or [run_prompt(options.workdir)]

    def show(row: int, token: int) -> None:
        print(subject.task.decode([token]), end="", flush=True)  # type: ignore[attr-defined]

    stream = options.stream and len(prompts) == 1
    if stream:
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
        on_token=show if stream else None,
    )
    if stream:
        print()
        return
    for prompt, text in zip(prompts, texts, strict=True):
        print(prompt + text)


def _reproduce(options: argparse.Namespace, _: Any) -> int:
    from jaxformer.config import papers

    chosen = papers() if options.paper == "all" else [options.paper]
    from jaxformer.catalogue import paper_module, reproduce

    failed = []
    for paper in chosen:
        paper_module(paper)
        workdir = Path(options.workdir or "runs/reproduce") / f"{paper}-{options.seed}"
        if not reproduce(paper, workdir, seed=options.seed):
            failed.append(paper)
        print((workdir / "report.md").read_text().split("\n## ")[0])
        print(f"report: {workdir / 'report.md'}")
    if failed:
        print(f"jaxformer: claims not met: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def _bench(options: argparse.Namespace, _: Any) -> None:
    given = {"stage": options.stage, "minutes": options.minutes, "tiny": options.tiny}
    given = {name: value for name, value in given.items() if value}
    if options.what == "h200":
        from jaxformer.bench.h200 import run

        print(run(Path(options.out or "bench"), **given))
        return
    if given or options.out:
        raise ConfigError(f"bench {options.what}: --{next(iter(given), 'out')} is for bench h200")
    from jaxformer.evaluation.report import text_table

    if options.what == "attention":
        from jaxformer.bench.attention import bench_attention as bench
    elif options.what == "data":
        from jaxformer.data.bench import bench_data as bench
    elif options.what == "loop":
        from jaxformer.train.bench import bench_loop as bench
    else:
        from jaxformer.train.bench import bench_checkpoint as bench
    print(text_table(bench()))
