"""The command line. Verbs import what they need, so that mistakes and lists show without jax."""

from __future__ import annotations

import argparse
import errno
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from jaxformer import launchers
from jaxformer.cli import checkpoints, papers, runs
from jaxformer.errors import STOPPED, ConfigError

DEFAULT = "flowformer:small"  # what verbs run when no config is named


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
    if full:
        error = RuntimeError(f"the disk is full ({error}); free some space, then run again")
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

    _run_verbs(verb)
    _checkpoint_verbs(verb)
    _paper_verbs(verb)
    return parser


Verb = Callable[[str, Any, str], argparse.ArgumentParser]  # name, function, help


def _run_verbs(verb: Verb) -> None:
    sub = verb("train", runs.train, "train a config; set its fields with --config.<field>=<value>")
    sub.add_argument("--config", default=DEFAULT, help="file or paper, with :preset")
    sub.add_argument("--mesh", help="a file of configs/mesh, such as v5e_256")
    sub.add_argument("--workdir", help="default: runs/<paper>-<preset>")
    sub.add_argument("--stop-after", type=int, metavar="STEP", help="save and leave at this step")
    sub.add_argument("--profile", metavar="steps=10..15", help="write an xprof trace of these")

    sub = verb("multihost", runs.multihost, "run a verb as several processes on this machine")
    sub.add_argument("--processes", type=int, required=True)
    sub.add_argument("--devices", type=int, default=1, help="simulated devices of each, on a CPU")
    sub.add_argument("--restarts", type=int, default=0, help="start again if one stops or dies")
    sub.add_argument("command", nargs=argparse.REMAINDER, help="-- train --config ...")

    sub = verb("launch", runs.launch, "hand a run to a cluster's scheduler: files, and the command")
    launchers.add_arguments(sub)

    sub = verb("soak", runs.soak, "hit a small run with every fault, and kill -9 until time is up")
    sub.add_argument("--minutes", type=float, default=20.0)
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--output", default="results/soak.json", help="a session is added to it")
    sub.add_argument("--kills-only", action="store_true", help="leave out the other faults")

    sub = verb("show", runs.show, "what a config is: phases, parameters, sharding, FLOPs, memory")
    sub.add_argument("config", help="file or paper, with :preset")

    sub = verb("plan", runs.plan, "compile a config's step for a pod that is not here: does it fit")
    sub.add_argument("--config", default=DEFAULT, help="file or paper, with :preset")
    sub.add_argument("--mesh", help="a file of configs/mesh, such as v5e_256")
    sub.add_argument("--topology", help="v5e:16x16, v5p:8x8x16, h200:8x8, ...; default: the mesh's")
    sub.add_argument("--search", action="store_true", help="find the largest micro-batch")
    sub.add_argument("--json", action="store_true", help="plain numbers: bytes, FLOPs, seconds")


def _checkpoint_verbs(verb: Verb) -> None:
    sub = verb("evaluate", checkpoints.evaluate, "measure checkpoints, one or many, side by side")
    sub.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT", help="run or folder")
    sub.add_argument("--steps", default="last", help="last, all, N or N:M")
    sub.add_argument("--text", action="append", help="a glob of text files: perplexity")
    sub.add_argument("--images", help="folder of classes, TFDS folder:split, or digits: accuracy")
    sub.add_argument("--choices", help='lines {"question", "choices", "answer"}: accuracy')
    how = "a few-shot task: answers in context, beside those after training on the same"
    sub.add_argument("--few-shot", metavar="TASK.json", help=how)
    sub.add_argument("--own", action="store_true", help="the run's evaluators beside the exams")
    sub.add_argument("--length", type=int, help="tokens of a window of text")
    sub.add_argument("--batch", type=int, help="rows; default: as many as fit, at most 32")
    sub.add_argument("--watch", action="store_true", help="each new checkpoint as it is written")
    sub.add_argument("--until", type=int, metavar="STEP", help="watch: the last one to wait for")
    sub.add_argument("--output", help="folder of the results; default: the first checkpoint's run")

    text = "make a run of a Hugging Face folder, an export, or authors' files"
    sub = verb("import", checkpoints.import_, text)
    sub.add_argument("source", help="folder, or with --paper a file of tensors")
    sub.add_argument("--paper", help="the paper whose authors' weights these are")
    sub.add_argument("--config", help="with --paper: its config, such as pfn:paper")
    sub.add_argument("--workdir", required=True)
    sub.add_argument("--dtype", choices=("float32", "bfloat16", "float16"))

    for name, run, text in (
        ("export", checkpoints.export, "write weights as safetensors, with config and model card"),
        (
            "convert",
            checkpoints.convert,
            "make a run of another: averaged, cast or restacked",
        ),
    ):
        sub = verb(name, run, text)
        sub.add_argument("run_folder", metavar="RUN")
        sub.add_argument("out", metavar="OUT", help="a new folder")
        sub.add_argument("--steps", default="last", help="last, all, N or N:M; several: their mean")
        sub.add_argument("--weights", choices=("averaged", "raw"), default="averaged")
        sub.add_argument("--dtype", choices=("float32", "bfloat16", "float16"))
        if name == "convert":
            sub.add_argument("--layers", choices=("stacked", "unrolled"))

    text = "make a checkpoint smaller by one or several papers' methods, and say what it costs"
    sub = verb("compress", checkpoints.compress, text)
    sub.add_argument("--checkpoint", required=True, help="run or Hugging Face folder")
    how = "adalog:w4a4, zero_tprune:0.65, ...; several: one after the other"
    sub.add_argument("--method", action="append", default=[], help=how)
    how = "adalog:w3a3,nvit:0.7+adalog:w4a4: chains to compare, which are not saved"
    sub.add_argument("--sweep", help=how)
    sub.add_argument("--calibration", help="images to look at, as for evaluate; default: its own")
    sub.add_argument("--images", help="images to test on, as for evaluate; default: its own")
    sub.add_argument("--examples", type=int, default=32, help="how many are looked at")
    sub.add_argument("--outliers", type=int, default=0, help="so many channels are made large")
    sub.add_argument("--seconds", type=float, default=30.0, help="of timing, at most")
    sub.add_argument("--out", required=True, help="a new run's folder, with the report")

    sub = verb("sample", checkpoints.sample, "continue a prompt, or draw pictures")
    sub.add_argument("--workdir", required=True)
    sub.add_argument("--step", type=int)
    sub.add_argument("--prompt", action="append", help="may be given several times")
    sub.add_argument("--length", type=int, default=200)
    sub.add_argument("--temperature", type=float, default=0.8)
    sub.add_argument("--top-k", type=int)
    sub.add_argument("--top-p", type=float)
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--stream", action="store_true", help="print tokens as they come")
    pictures = sub.add_argument_group("of a run that denoises; defaults are its config's")
    pictures.add_argument("--output", help="default: samples.png in the run's folder")
    pictures.add_argument("--size", help="32 or 32x48 (height x width): not only that trained on")
    pictures.add_argument("--labels", help="0,1,2: classes of the columns")
    pictures.add_argument("--guidance", type=float, help="1: none")
    pictures.add_argument("--steps", type=int, help="of the sampler")
    pictures.add_argument("--rows", type=int)
    pictures.add_argument("--columns", type=int)


def _paper_verbs(verb: Verb) -> None:
    sub = verb("list", papers.list_papers, "the papers, their configs and presets")
    form = sub.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true")
    form.add_argument("--markdown", action="store_true")

    sub = verb("reproduce", papers.reproduce, "measure the claims of a paper")
    sub.add_argument("paper", help="a paper, or all")
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--workdir", help="default: runs/reproduce/<paper>-<seed>")

    sub = verb(
        "compare", papers.compare, "every attention in one model: quality and cost by length"
    )
    sub.add_argument("--mixers", default="softmax,linear", help="names with commas, or all")
    sub.add_argument("--task", default="lm", help="lm, recall, listops or digits")
    sub.add_argument("--lengths", default="512,1k,4k,16k", help="trained at the first")
    sub.add_argument("--steps", type=int, default=300, help="0: time and memory alone")
    sub.add_argument("--seeds", default="0")
    sub.add_argument("--batch", type=int, default=8)
    sub.add_argument("--width", type=int, default=64)
    sub.add_argument("--depth", type=int, default=2)
    sub.add_argument("--heads", type=int, default=4)
    sub.add_argument("--out", default="results/compare", help="folder of the page and figures")

    sub = verb("bench", papers.bench, "measure this machine: ratios within one run")
    what = ("loop", "sweep", "regressions", "attention", "data", "checkpoint", "decode")
    sub.add_argument("what", choices=(*what, "compress", "h200"))
    sub.add_argument("--out", help="h200: folder of the results (bench)")
    sub.add_argument("--stage", help="h200: numerics, peak, forward, ... (all)")
    sub.add_argument("--minutes", type=float, help="h200: time limit of a stage (7)")
    sub.add_argument("--tiny", action="store_true", help="h200: in miniature, on any machine")


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
