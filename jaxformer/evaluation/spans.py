"""SQuAD's exact match and F1 of answers that are spans of a text (Rajpurkar et al. 2016)."""

from __future__ import annotations

import collections
import dataclasses
import re
import string
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

LONGEST = 30  # pieces of an answer, as in BERT's run_squad.py


def normalise(text: str) -> str:
    """In lower case, without punctuation, articles and spare spaces, as evaluate-v1.1.py does."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact(found: str, wanted: str) -> float:
    """1.0 where both read the same."""
    return float(normalise(found) == normalise(wanted))


def f1(found: str, wanted: str) -> float:
    """The harmonic mean of precision and recall of words, counted as often as they occur."""
    ours, theirs = normalise(found).split(), normalise(wanted).split()
    common = (collections.Counter(ours) & collections.Counter(theirs)).total()
    return 2 * common / (len(ours) + len(theirs)) if common else 0.0


def best(score: Callable[[str, str], float], found: str, wanted: Iterable[str]) -> float:
    """The score with the answer of those people gave that it is closest to."""
    return max(score(found, each) for each in wanted)


def best_spans(
    logits_Nx2xL: np.ndarray, inside_NxL: np.ndarray, longest: int = LONGEST
) -> tuple[np.ndarray, np.ndarray]:
    """(N,) the largest sum of two logits, and (N, 2) the first and the last position it is of.

    Both are `inside`, the last not before the first, and at most `longest` positions are spanned.
    All pairs are looked at, length by length, so that there are no n best to choose. Where there
    is none the sum is -inf.
    """
    start, end = np.where(inside_NxL[:, None], logits_Nx2xL, -np.inf).swapaxes(0, 1)
    rows, length = np.arange(len(start)), start.shape[1]
    most, span = np.full(len(start), -np.inf), np.zeros((len(start), 2), int)
    for more in range(min(longest, length)):
        total = start[:, : length - more] + end[:, more:]
        first = total.argmax(1)
        better = total[rows, first] > most
        most = np.where(better, total[rows, first], most)
        span[better] = np.stack([first, first + more], 1)[better]
    return most, span


@dataclasses.dataclass(frozen=True)
class SpanScores:
    """The scores "exact" and "f1" of the questions of `source`, a `Squad`: `MeanEvaluator.whole`.

    The answer to a question is the best span of its windows; of the answers that people gave the
    one it is closest to counts. Where the rows end early, questions without any are left out.
    """

    source: Any
    columns: tuple[str, ...] = ()

    def __call__(self, rows: Mapping[str, np.ndarray]) -> dict[str, float]:
        wanted = {
            question.name: [text for text, _ in question.answers]
            for question in self.source.questions
        }
        found = self.answers(rows["answer"])
        return {
            name: float(np.mean([best(score, text, wanted[q]) for q, text in found.items()]))
            for name, score in (("exact", exact), ("f1", f1))
        }

    def answers(self, logits_Nx2xL: np.ndarray) -> dict[str, str]:
        """{name of a question: its answer}, from the logits of the first N windows."""
        source, length = self.source, logits_Nx2xL.shape[-1]
        inside = np.zeros((len(logits_Nx2xL), length), bool)
        for row in range(len(inside)):
            begin, characters = source.inside(row)
            inside[row, begin : begin + len(characters)] = True
        scores, spans = best_spans(logits_Nx2xL, inside)
        chosen: dict[int, int] = {}
        for row, score in enumerate(scores):
            number = source.windows[row].question
            if number not in chosen or score > scores[chosen[number]]:
                chosen[number] = row
        return {source.questions[n].name: self._text(row, spans[row]) for n, row in chosen.items()}

    def _text(self, row: int, span: np.ndarray) -> str:
        begin, characters = self.source.inside(row)
        if not len(characters):
            return ""
        first, last = span - begin
        context = self.source.contexts[self.source.questions[self.source.windows[row].question][2]]
        return context[characters[first, 0] : characters[last, 1]]
