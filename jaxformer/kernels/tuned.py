"""Tile sizes that were measured to be the best, by device: `tiles/<device>.json`.

`jaxformer bench h200 --stage tune` writes them as tiles.json. A file is a list of entries, each a
mapping of what was asked for (op, impl, head_size, causal, L, ...) and the `tiles` that won.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from jaxformer.kernels.target import target

FOLDER = Path(__file__).parent / "tiles"


def tuned(op: str, impl: str, length: int, **case: Any) -> list[int | None] | None:
    """The tiles for a case on the target, of the nearest length that was measured, or None."""
    entries = [
        entry
        for entry in _entries(target().kind)
        if entry["op"] == op
        and entry["impl"] == impl
        and all(entry.get(name) == value for name, value in case.items())
    ]
    if not entries:
        return None
    return min(entries, key=lambda entry: abs(entry["L"] - length))["tiles"]


@functools.cache
def _entries(device: str) -> list[dict[str, Any]]:
    file = FOLDER / f"{device.replace(' ', '_').lower()}.json"
    return json.loads(file.read_text())["entries"] if file.exists() else []
