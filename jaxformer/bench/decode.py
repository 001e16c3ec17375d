"""`jaxformer bench decode`: greedy continuation beside `transformers`, from one folder of weights.

The model has the size of GPT-2 (124M) and random weights, which `transformers` writes and both
sides read. They take turns in one process, each at its best settings: PyTorch's are found by a
race over a few tokens.
"""

from __future__ import annotations

import functools
import importlib.util
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxformer.bench.clock import Deadline, Run, Timing, race
from jaxformer.errors import ConfigError
from jaxformer.interop import huggingface
from jaxformer.sampling.autoregressive import generate

SEED = 0


class Setting(NamedTuple):
    """How `transformers` generates: on how many threads, compiled with a static cache or not."""

    threads: int
    compiled: bool

    def __str__(self) -> str:
        cache = "compiled, static cache" if self.compiled else "eager, dynamic cache"
        return f"{cache}, {self.threads} thread{'s' if self.threads > 1 else ''}"


Tokens = np.ndarray  # (B, new)
Generate = Callable[[int], Tokens]  # that many new tokens


def bench_decode(
    batches: Sequence[int] = (1, 8),
    *,
    prompt: int = 512,
    length: int = 128,
    types: Sequence[str] = ("float32", "bfloat16"),
    rounds: int = 3,
    trial: int = 8,
    **sizes: int,
) -> list[dict[str, Any]]:
    """New tokens per second of both, their ratio, and where ours go: a row per batch and type.

    The rate is of `length` tokens after a prompt, reading the prompt included; "prefill s" is the
    time of ours to the first token, "ms / token" that of each further one. "same tokens" is the
    share that both sides chose alike, which in float32 must be all. Settings of PyTorch race for
    `trial` tokens. `sizes` are fields of `GPT2Config` in place of GPT-2's own.

    Raises:
        ConfigError: torch or transformers is not installed.
    """
    for package in ("torch", "transformers"):
        if importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"bench decode: needs {package}; install the test extra: pip install '.[test]'"
            )
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        vocabulary = _write_model(folder, **sizes)
        for batch in batches:
            drawn = np.random.default_rng(SEED).integers(0, vocabulary, (batch, prompt))
            for dtype in types:
                row = {"batch": batch, "type": dtype}
                rows.append(row | _compare(folder, drawn, dtype, length, rounds, trial))
    return rows


def _compare(
    folder: str, prompts: np.ndarray, dtype: str, length: int, rounds: int, trial: int
) -> dict[str, Any]:
    ours, theirs = _ours(folder, prompts, dtype), _theirs(folder, prompts, dtype)
    settings = {str(setting): setting for setting in _settings()}
    tried = race({s: _run(theirs(settings[s]), trial) for s in settings}, Deadline.after(60, 2))
    able = {s: timing.seconds for s, timing in tried.items() if timing.seconds is not None}
    if not able:
        return {"error": "; ".join(timing.error for timing in tried.values())}
    best = min(able, key=lambda s: able[s])
    chosen: dict[str, Tokens] = {}
    builds = {
        "first": _run(ours, 1),
        "ours": _run(ours, length, chosen, "ours"),
        "theirs": _run(theirs(settings[best]), length, chosen, "theirs"),
    }
    timings = race(builds, Deadline.after(300, rounds))
    errors = [timing.error for timing in timings.values() if timing.error]
    if errors:
        return {"error": "; ".join(errors)}
    same = (chosen["ours"] == chosen["theirs"]).mean()
    if dtype == "float32" and same < 1:
        raise AssertionError(
            f"bench decode: {1 - same:.2%} of the greedy tokens differ from those of transformers"
        )
    return _row(timings, len(prompts), length) | {"same tokens": f"{same:.1%}", "theirs": best}


def _row(timings: dict[str, Timing], batch: int, length: int) -> dict[str, Any]:
    first, ours, theirs = (timings[who].seconds for who in ("first", "ours", "theirs"))
    return {
        "tokens/s": batch * length / ours,
        "theirs tokens/s": batch * length / theirs,
        "ratio": theirs / ours,
        "prefill s": first,
        "ms / token": (ours - first) / (length - 1) * 1e3,
        "rounds": timings["theirs"].samples,
    }


def _run(
    generate: Generate, length: int, chosen: dict[str, Tokens] | None = None, who: str = ""
) -> Callable[[], Run]:
    """A run of `length` tokens, which are left in `chosen`."""
    kept = {} if chosen is None else chosen
    return lambda: Run(lambda: generate(length), lambda tokens: kept.update({who: tokens}))


def _write_model(folder: str, **sizes: int) -> int:
    """Write a folder with random weights; the size of its vocabulary."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(SEED)
    config = transformers.GPT2Config(**sizes)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    return config.vocab_size


def _ours(folder: str, prompts: np.ndarray, dtype: str) -> Generate:
    loaded = huggingface.load(Path(folder), dtype=dtype, compute=dtype)
    task, rows = loaded.port.make_task(), prompts.tolist()
    key = jax.random.key(SEED)  # not used: the largest is taken

    def run(length: int) -> Tokens:
        options = {"length": length, "key": key, "temperature": 0.0}
        return np.asarray(generate(task, loaded.params, {}, rows, **options))

    return run


def _settings() -> list[Setting]:
    import torch

    most = torch.get_num_threads()
    threads = sorted({1, most}, reverse=True)
    return [Setting(n, False) for n in threads] + [Setting(most, True)]


def _theirs(folder: str, prompts: np.ndarray, dtype: str) -> Callable[[Setting], Generate]:
    import torch
    import transformers

    model = transformers.GPT2LMHeadModel.from_pretrained(
        folder, dtype=getattr(torch, dtype), attn_implementation="sdpa"
    ).eval()
    given = torch.tensor(prompts)

    def run(setting: Setting, length: int) -> Tokens:
        before = torch.get_num_threads()
        torch.set_num_threads(setting.threads)
        try:
            with torch.inference_mode():
                out = model.generate(
                    given,
                    attention_mask=torch.ones_like(given),
                    generation_config=_rule(setting, length),
                )
        finally:
            torch.set_num_threads(before)
        return out[:, given.shape[1] :].numpy()

    return lambda setting: functools.partial(run, setting)


def _rule(setting: Setting, length: int) -> Any:
    """Greedy, exactly `length` tokens."""
    import transformers

    rule = transformers.GenerationConfig(
        max_new_tokens=length, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    if setting.compiled:
        rule.cache_implementation = "static"
        rule.compile_config = transformers.CompileConfig()
        rule.compile_config._compile_all_devices = True  # it compiles for GPUs only, otherwise
    return rule
