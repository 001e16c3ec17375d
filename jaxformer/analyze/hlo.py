"""What a compiled program sends between devices, read from its HLO text."""

from __future__ import annotations

import collections
import dataclasses
import math
import re

import numpy as np

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
NAME = r"[\w.\-]+"
BITS = {"pred": 8, "bf16": 16, "f8e4m3fn": 8, "f8e5m2": 8}

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|branch_computations)=(\{[^}]*\}|[%\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_LIMIT = re.compile(r"s32\[\]\S* constant\((\d+)\)")
_COLLECTIVE = re.compile(rf"= (.*?) ({'|'.join(KINDS)})(-start)?\(")
# Between slices of TPUs the host sends: what is left of a collective after the part within a slice.
_BETWEEN = re.compile(r"= \((.*?), u32\[\], token\[\]\) send\(.*xla_megascale_runtime")
_CHANNEL = re.compile(r"channel_id=(\d+)")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True, order=True)
class Traffic:
    """Of one kind of collective: how often it runs, and the bytes that each device sends.

    `between` is the part of `sent` in groups of devices of several slices or hosts.
    """

    calls: int
    sent: float
    between: float = 0.0


def collectives(text: str, slice_size: int | None = None) -> dict[str, Traffic]:
    """The collectives of one run of a program, by kind; `slice_size` devices are one slice or host.

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
                group = _group(line)
                sent = times * _sent(kind, match[1], bool(match[3]), scattered, len(group))
                crosses = slice_size is not None and len({i // slice_size for i in group}) > 1
                part = Traffic(times, sent, sent if crosses else 0.0)
                parts[key] = max(parts.get(key, Traffic(0, 0.0)), part)
            sent_on = _BETWEEN.search(line)
            if sent_on:
                sent = times * sum(_bytes(array) for array in _ARRAY.findall(sent_on[1]))
                parts["send", line] = Traffic(times, sent, sent)
    found: dict[str, Traffic] = {}
    for (kind, *_), part in parts.items():
        before = found.get(kind, Traffic(0, 0.0))
        found[kind] = Traffic(
            before.calls + part.calls, before.sent + part.sent, before.between + part.between
        )
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


def _group(line: str) -> list[int]:
    """The devices of one group, by their place in the mesh; two where nothing tells."""
    iota = re.search(r"replica_groups=(\[\d+,\d+\]<=\[[\d,]+\]\S*)", line)
    if iota:
        return [int(i) for i in _iota(iota[1])[0]]
    # mesh['a'=4,'b'=2] {'a'}, with an order of the devices between the two or without
    named = re.search(r"replica_groups=mesh\[(.*?)\](?:, \w+=\((\S+)\))?\s*\{(.*?)\}", line)
    if named:
        sizes = {axis: int(n) for axis, n in re.findall(r"'([^']+)'=(\d+)", named[1])}
        order = _iota(named[2]) if named[2] else np.arange(math.prod(sizes.values()))
        of = set(re.findall(r"'([^']+)'", named[3]))
        places = order.reshape(tuple(sizes.values()))
        first = places[tuple(slice(None) if axis in of else 0 for axis in sizes)]
        return [int(i) for i in first.flat]
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", line)
    return [int(i) for i in listed[1].split(",")] if listed else [0, 1]


def _iota(text: str) -> np.ndarray:
    """[2,4]<=[4,2]T(1,0): the numbers of a shape, transposed, in another shape."""
    shape, _, source = text.partition("<=")
    found = re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", source or shape)
    assert found is not None, text
    dimensions = [int(n) for n in found[1].split(",")]
    numbers = np.arange(math.prod(dimensions)).reshape(dimensions)
    if found[2]:
        numbers = numbers.transpose([int(n) for n in found[2].split(",")])
    return numbers.reshape([int(n) for n in shape.strip("[]").split(",")]) if source else numbers
