"""ListOps (Nangia & Bowman 2018, arXiv 1804.06028): nested lists of digits with operators."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Sequence

import numpy as np

from jaxformer.data.base import Example
from jaxformer.recipe import ConfigError

OPERATORS: dict[str, Callable[[Sequence[int]], int]] = {
    "MIN": min,
    "MAX": max,
    "MED": lambda values: int(statistics.median(values)),
    "SM": lambda values: sum(values) % 10,
}
TOKENS = ("<pad>", *map(str, range(10)), *(f"[{name}" for name in OPERATORS), "]")
CLASSES = 10


@dataclasses.dataclass(frozen=True)
class ListOps:
    """`size` expressions of at most `length` tokens and `depth` nested lists, made when asked for.

    Examples are {"inputs": (length,) int32, "valid": (length,) bool, "label": int32, the value of
    the expression}. Example i depends on (seed, i) alone.

    Raises:
        ConfigError: a length or depth too small for any expression.
    """

    size: int
    length: int = 128
    depth: int = 4
    arguments: int = 5  # most arguments of a list
    shortest: int = 12  # tokens, so that one list of digits is not enough
    seed: int = 0

    def __post_init__(self) -> None:
        if self.length < 2 * self.shortest or self.depth < 2:
            raise ConfigError(
                f"data.length: {self.length} and depth {self.depth}; ListOps needs a length of at "
                f"least {2 * self.shortest} and a depth of at least 2"
            )

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Example:
        rng = np.random.default_rng([self.seed, index])
        while True:
            tokens, value = self._list(rng, 1)
            if self.shortest <= len(tokens) <= self.length:
                break
        padded = np.zeros(self.length, np.int32)
        padded[: len(tokens)] = tokens
        return {
            "inputs": padded,
            "valid": np.arange(self.length) < len(tokens),
            "label": np.int32(value),
        }

    def _list(self, rng: np.random.Generator, depth: int) -> tuple[list[int], int]:
        name = list(OPERATORS)[rng.integers(len(OPERATORS))]
        tokens, values = [TOKENS.index(f"[{name}")], []
        for _ in range(rng.integers(2, self.arguments + 1)):
            # Deeper lists are rarer; at the last depth there are only digits.
            if depth < self.depth and rng.random() < 0.5:
                inner, value = self._list(rng, depth + 1)
            else:
                value = int(rng.integers(10))
                inner = [1 + value]
            tokens += inner
            values.append(value)
        return [*tokens, len(TOKENS) - 1], OPERATORS[name](values)
