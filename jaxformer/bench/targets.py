"""What the kernels are measured against: ratios of rows of one run, above which all is well."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

Row = Mapping[str, Any]
Rows = Mapping[str, Sequence[Row]]  # by stage


class Target(NamedTuple):
    """`measure(rows)` is a ratio, None where a row it needs is not there."""

    name: str
    accept: float
    stretch: float
    measure: Callable[[Rows], float | None]


def _fastest(rows: Sequence[Row], who: str) -> float | None:
    """Milliseconds of the fastest row of those `who`."""
    times = [row["ms"] for row in rows if row["who"].startswith(who) and row.get("ms")]
    return min(times, default=None)


def _select(rows: Sequence[Row], **case: Any) -> list[Row]:
    return [row for row in rows if all(row.get(name) == value for name, value in case.items())]


def _worst(ratios: Sequence[float | None]) -> float | None:
    return min((x for x in ratios if x is not None), default=None)


def _over(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a / b


def _beside_cudnn(
    stage: str, size: int, causal: bool | None, lengths: range
) -> Callable[[Rows], float | None]:
    """Time of cuDNN over ours, at the worst of the lengths that were measured."""

    def measure(rows: Rows) -> float | None:
        ratios = []
        for state in (True, False) if causal is None else (causal,):
            found = _select(rows.get(stage, ()), head_size=size, causal=state)
            for length in sorted({row["L"] for row in found if row["L"] in lengths}):
                at = _select(found, L=length)
                ratios.append(_over(_fastest(at, "cudnn"), _fastest(at, "ours")))
        return _worst(ratios)

    return measure


def _mod(direction: str, against: str) -> Callable[[Rows], float | None]:
    """Rates of the modified op over those of `against`: the worst of the common mods."""
    names = ("soft-cap", "ALiBi", "window 1k", "prefix", "Toeplitz add", "Toeplitz multiply")

    def rate(rows: Sequence[Row], who: str) -> float | None:
        found = [row["TFLOP/s"] for row in rows if row["who"].startswith(who) and "ms" in row]
        return max(found, default=None)

    def measure(rows: Rows) -> float | None:
        found = [
            r for r in _select(rows.get("mods", ()), **{"pass": direction}) if r["mod"] in names
        ]
        cases = {(row["mod"], row["L"], row["head_size"]) for row in found}
        ratios = []
        for mod, length, size in sorted(cases):
            at = _select(found, mod=mod, L=length, head_size=size)
            ratios.append(_over(rate(at, "ours"), rate(at, against)))
        return _worst(ratios)

    return measure


def _window(rows: Rows) -> float | None:
    """Full causal attention over a window of 1k, at L = 16k."""
    at = _select(rows.get("mods", ()), mod="window 1k", L=16384, **{"pass": "forward"})
    return _over(_fastest(at, "plain"), _fastest(at, "ours"))


def _linear(length: int, against: str) -> Callable[[Rows], float | None]:
    def measure(rows: Rows) -> float | None:
        at = _select(rows.get("linear", ()), L=length, **{"pass": "forward"})
        at = [row for row in at if not row["who"].endswith("bidirectional")]
        return _over(_fastest(at, against), _fastest(at, "ours"))

    return measure


def _flow(rows: Rows) -> float | None:
    at = _select(rows.get("linear", ()), L=16384, **{"pass": "forward"})
    at = [row for row in at if not row["who"].endswith("bidirectional")]
    return _over(_fastest(at, "ours"), _fastest(at, "flow"))


def _linear_time(direction: str, milliseconds: float) -> Callable[[Rows], float | None]:
    """A limit over the time of (2, 16384, 16, 128): above 1 is faster than the limit."""

    def measure(rows: Rows) -> float | None:
        at = _select(rows.get("linear", ()), shape=[2, 16384, 16, 128], **{"pass": direction})
        at = [row for row in at if not row["who"].endswith("bidirectional")]
        return _over(milliseconds, _fastest(at, "ours"))

    return measure


def _mfu(model: str) -> Callable[[Rows], float | None]:
    def measure(rows: Rows) -> float | None:
        return next((r.get("MFU") for r in _select(rows.get("train", ()), model=model)), None)

    return measure


LONG = range(2048, 32769)
TARGETS = (
    Target("forward / cuDNN, hd64", 0.85, 1.05, _beside_cudnn("forward", 64, None, LONG)),
    Target("forward / cuDNN, hd128 full", 0.80, 0.95, _beside_cudnn("forward", 128, False, LONG)),
    Target(
        "forward / cuDNN, hd128 causal, L = 2k",
        0.70,
        0.90,
        _beside_cudnn("forward", 128, True, range(2048, 2049)),
    ),
    Target(
        "forward / cuDNN, hd128 causal, L >= 8k",
        0.80,
        0.95,
        _beside_cudnn("forward", 128, True, range(8192, 32769)),
    ),
    Target("forward / cuDNN, hd256 full", 0.85, 1.10, _beside_cudnn("forward", 256, False, LONG)),
    Target("backward / cuDNN, hd64", 0.55, 0.75, _beside_cudnn("backward", 64, None, LONG)),
    Target("backward / cuDNN, hd128", 0.55, 0.75, _beside_cudnn("backward", 128, None, LONG)),
    Target("mods / own plain, forward", 0.85, 0.95, _mod("forward", "plain")),
    Target("mods / own plain, backward", 0.80, 0.90, _mod("backward", "plain")),
    Target("mods / FlexAttention, forward", 1.1, 1.5, _mod("forward", "torch flex")),
    Target("mods / FlexAttention, backward", 1.1, 1.5, _mod("backward", "torch flex")),
    Target("window 1k / full causal, L = 16k", 5.0, 7.0, _window),
    Target("linear / cuDNN causal, L = 16k", 2.5, 5.0, _linear(16384, "cudnn")),
    Target("linear / cuDNN causal, L = 4k", 1.0, 1.5, _linear(4096, "cudnn")),
    Target("linear / XLA scan, L = 16k", 2.0, 4.0, _linear(16384, "xla scan")),
    Target("linear forward, 1.5 ms / time", 1.0, 1.5 / 0.8, _linear_time("forward", 1.5)),
    Target("linear forward + backward, 4 ms / time", 1.0, 4 / 2.5, _linear_time("both", 4.0)),
    Target("flow / linear attention", 0.6, 0.8, _flow),
    Target("MFU GPT-2 124M", 0.35, 0.45, _mfu("GPT-2 124M")),
    Target("MFU GPT 1.3B", 0.44, 0.52, _mfu("GPT 1.3B")),
    Target("MFU ViT-L/16", 0.40, 0.48, _mfu("ViT-L/16 224")),
    Target("MFU DiT-XL/2", 0.36, 0.45, _mfu("DiT-XL/2")),
)


def judge(rows: Rows) -> list[dict[str, Any]]:
    """A row per target, "not measured" where there is no figure."""
    table = []
    for target in TARGETS:
        value = target.measure(rows)
        verdict = "not measured"
        if value is not None:
            verdict = "missed" if value < target.accept else "accept"
            verdict = "stretch" if value >= target.stretch else verdict
        table.append(
            {
                "target": target.name,
                "measured": "not measured" if value is None else value,
                "accept": target.accept,
                "stretch": target.stretch,
                "verdict": verdict,
            }
        )
    return table
