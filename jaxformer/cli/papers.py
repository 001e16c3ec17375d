"""Verbs on papers and on this machine: what there is, which claims hold, how fast it is."""

from __future__ import annotations

import argparse
import ast
import json
import sys
from pathlib import Path
from typing import Any

from jaxformer.errors import ConfigError


def list_papers(options: argparse.Namespace, _: Any) -> None:
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


def reproduce(options: argparse.Namespace, _: Any) -> int:
    from jaxformer.config import papers

    chosen = papers() if options.paper == "all" else [options.paper]
    import jax

    from jaxformer.catalogue import paper_module, reproduce

    for paper in chosen:
        paper_module(paper)
    if jax.config.jax_compilation_cache_dir is None:
        # A claim trains the same program on several seeds; each is compiled once.
        root = Path(options.workdir or "runs/reproduce")
        jax.config.update("jax_compilation_cache_dir", str(root.absolute() / "compiled"))
    failed = []
    for paper in chosen:
        workdir = Path(options.workdir or "runs/reproduce") / f"{paper}-{options.seed}"
        if not reproduce(paper, workdir, seed=options.seed):
            failed.append(paper)
        print((workdir / "report.md").read_text().split("\n## ")[0])
        print(f"report: {workdir / 'report.md'}")
    if failed:
        print(f"jaxformer: claims not met: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def compare(options: argparse.Namespace, _: Any) -> None:
    from jaxformer.tools.compare import Comparison, compare, offered

    mixers = offered() if options.mixers == "all" else options.mixers.split(",")
    sizes = {name: getattr(options, name) for name in ("steps", "batch", "width", "depth", "heads")}
    lengths, seeds = _numbers("lengths", options.lengths), _numbers("seeds", options.seeds)
    what = Comparison(tuple(mixers), options.task, lengths, seeds=seeds, **sizes)
    print(compare(what, Path(options.out)))


def _numbers(field: str, text: str) -> tuple[int, ...]:
    """(512, 4096) of "512,4k"."""
    try:
        words = text.lower().split(",")
        return tuple(1024 * int(w[:-1]) if w.endswith("k") else int(w) for w in words)
    except ValueError:
        raise ConfigError(f"{field}: {text!r} is no list of numbers such as 512,1k,4k") from None


def bench(options: argparse.Namespace, _: Any) -> None:
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
    elif options.what == "compress":
        from jaxformer.bench.compress import bench_compress as bench
    elif options.what == "data":
        from jaxformer.data.bench import bench_data as bench
    elif options.what == "decode":
        from jaxformer.bench.decode import bench_decode as bench
    elif options.what == "sweep":
        from jaxformer.train.bench import bench_sweep as bench
    elif options.what == "regressions":
        from jaxformer.bench.regressions import bench_regressions as bench
    elif options.what == "loop":
        import jax

        from jaxformer.parallel import multihost
        from jaxformer.train.bench import bench_loop

        multihost.start()
        table = text_table(bench_loop())
        if jax.process_index() == 0:
            print(table)
        multihost.finish()
        return
    else:
        from jaxformer.train.bench import bench_checkpoint as bench
    print(text_table(bench()))
