"""What a compiled program sends between devices, read from its HLO text."""

from __future__ import annotations

import collections
import dataclasses
import math
import re

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
NAME = r"[\w.\-]+"
BITS = {"pred": 8, "bf16": 16, "f8e4m3fn": 8, "f8e5m2": 8}

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|branch_computations)=(\{[^}]*\}|[%\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_LIMIT = re.compile(r"s32\[\]\S* constant\((\d+)\)")
_COLLECTIVE = re.compile(rf"= (.*?) ({'|'.join(KINDS)})(-start)?\(")
_CHANNEL = re.compile(r"channel_id=(\d+)")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True, order=True)
class Traffic:
    """Of one kind of collective: how often it runs, and the bytes that each device sends."""

    calls: int
    sent: float


def collectives(text: str) -> dict[str, Traffic]:
    """The collectives of one run of a program, by kind.

    A loop that does not tell how often it turns counts as often as the number that its condition
    compares with. A ring of n devices sends (n - 1) / n of the whole array for a gather or
    scatter, twice that for an all-reduce.
    """
    lines = _lines(text)
    # On TPUs one collective may be spread over several fusions, which share its channel.
    parts: dict[tuple[str, ...], Traffic] = {}
    for name, times in _runs(lines).items():
        for line in lines.get(name, ()):
            match = _COLLECTIVE.search(line)
            if match:
                kind = match[2]
                # A scatter on TPUs is a fusion that holds an all-reduce.
                kind = "reduce-scatter" if name.startswith("all-reduce-scatter") else kind
                scattered = match[2] == "reduce-scatter"
                channel = _CHANNEL.search(line)
                # Its parts may differ in layout, which is left out.
                arrays = str(_ARRAY.findall(match[1]))
                key = kind, arrays, channel[1] if channel else line
                sent = times * _sent(kind, match[1], bool(match[3]), scattered, _group(line))
                parts[key] = max(parts.get(key, Traffic(0, 0.0)), Traffic(times, sent))
    found: dict[str, Traffic] = {}
    for (kind, *_), part in parts.items():
        before = found.get(kind, Traffic(0, 0.0))
        found[kind] = Traffic(before.calls + part.calls, before.sent + part.sent)
    return found


def _lines(text: str) -> dict[str, list[str]]:
    """The instructions of every computation; "" is the entry."""
    found: dict[str, list[str]] = collections.defaultdict(list)
    name = None
    for line in text.splitlines():
        head = _COMPUTATION.match(line)
        if head:
            name = "" if line.startswith("ENTRY") else head[1]
        elif line == "}":  # a kernel's own text may hold lines that start with one
            name = None
        elif name is not None:
            found[name].append(line)
    return found


def _runs(lines: dict[str, list[str]]) -> dict[str, int]:
    """How often each computation runs."""
    runs: collections.Counter[str] = collections.Counter()

    def visit(name: str, times: int) -> None:
        runs[name] += times
        for line in lines.get(name, ()):
            called = [one for names in _CALLED.findall(line) for one in re.findall(NAME, names)]
            inside = times * (_trips(line, lines) if " while(" in line else 1)
            for one in called:
                visit(one, inside)

    visit("", 1)
    return runs


def _trips(loop: str, lines: dict[str, list[str]]) -> int:
    """How often a loop turns; 1 where nothing tells."""
    known = _TRIPS.search(loop)
    if known:
        return int(known[1])
    condition = re.search(r"condition=%?([\w.\-]+)", loop)
    body = lines.get(condition[1], []) if condition else []
    limits = [int(n) for line in body for n in _LIMIT.findall(line)]
    counts_up = any("direction=LT" in line for line in body)
    return limits[0] if counts_up and len(limits) == 1 else 1


def _sent(kind: str, shape: str, started: bool, scattered: bool, n: int) -> float:
    """Bytes that each of n devices sends; `shape` is that of the result."""
    sizes = [_bytes(array) for array in _ARRAY.findall(shape)]
    whole = sum(sizes)
    if started and kind != "all-reduce":  # (operands, results): the larger half is the whole
        whole = max(sum(sizes[: len(sizes) // 2]), sum(sizes[len(sizes) // 2 :]))
    elif scattered:
        whole *= n
    if kind == "collective-permute":
        return whole
    return whole * (n - 1) / n * (2 if kind == "all-reduce" else 1)


def _bytes(array: tuple[str, str]) -> float:
    kind, dimensions = array
    digits = re.search(r"\d+$", kind)
    bits = BITS.get(kind) or (int(digits[0]) if digits else 0)
    return math.prod(int(n) for n in dimensions.split(",") if n) * bits / 8


def _group(line: str) -> int:
    """How many devices take part in one group."""
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]", line)
    if iota:
        return int(iota[2])
    named = re.search(r"replica_groups=mesh\[(.*?)\]\s*\{(.*?)\}", line)
    if named:
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", named[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'([^']+)'", named[2]))
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", line)
    return len(listed[1].split(",")) if listed else 2
