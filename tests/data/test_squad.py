"""SQuAD v1.1 from small files in the layout of the real ones."""

import json

import numpy as np
import pytest

from jaxformer.data.sources import squad
from jaxformer.data.sources.squad import Squad
from jaxformer.data.sources.tokenizers import NamedTokenizer
from jaxformer.recipe import ConfigError

WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] the cafe was open ##ed in 18 ##89 , by zoe who where ? a"
PIECES = WORDS.split()
CONTEXT = "The Café was\n opened in 1889, by Zoë."
QUESTIONS = [
    ("q1", "Who opened the cafe?", [("Zoë", 33), ("by Zoë", 30)]),
    ("q2", "Where was the cafe opened in?", [("opened in 1889", 14)]),
    ("q3", "The cafe opened in?", [("89", 26)]),
]


def paragraph(context=CONTEXT, questions=QUESTIONS):
    asked = [
        {
            "id": name,
            "question": text,
            "answers": [{"text": answer, "answer_start": start} for answer, start in answers],
        }
        for name, text, answers in questions
    ]
    return {"context": context, "qas": asked}


def write(folder, *paragraphs, split="dev"):
    articles = [{"title": f"T{i}", "paragraphs": [p]} for i, p in enumerate(paragraphs)]
    page = {"version": "1.1", "data": articles}
    (folder / squad.FILES[split]).write_text(json.dumps(page), encoding="utf-8")
    (folder / "vocab.txt").write_text("\n".join(PIECES) + "\n")
    return str(folder)


def source(folder, *paragraphs, split="dev", **options):
    where = write(folder, *(paragraphs or [paragraph()]), split=split)
    return Squad(where, split, NamedTokenizer(f"{where}/vocab.txt"), **options)


def test_pieces_know_their_characters(tmp_path):
    """Accents are stripped, words split and spaces dropped, and yet the text is found again."""
    write(tmp_path)
    tokenizer = NamedTokenizer(f"{tmp_path}/vocab.txt")
    tokens, characters = tokenizer.locate(CONTEXT)
    np.testing.assert_array_equal(tokens, tokenizer.encode(CONTEXT))
    said = [PIECES[t] for t in tokens]
    expected = ["the", "cafe", "was", "open", "##ed", "in", "18", "##89", ",", "by", "zoe"]
    assert said == [*expected, "[UNK]"]
    found = [CONTEXT[first:last] for first, last in characters]
    assert found == ["The", "Café", "was", "open", "ed", "in", "18", "89", ",", "by", "Zoë", "."]


def test_answers_are_mapped_to_pieces(tmp_path):
    found = source(tmp_path, split="train", length=32)
    assert len(found) == len(QUESTIONS) == len(found.windows)
    for example in (found[i] for i in range(len(found))):
        for key, (shape, dtype) in squad.row(32).items():
            assert example[key].shape == shape and example[key].dtype == dtype
    example = found[0]
    tokens, types = example["inputs"].T
    said = [PIECES[t] for t in tokens[:8]]
    assert said == ["[CLS]", "who", "open", "##ed", "the", "cafe", "?", "[SEP]"]
    assert PIECES[tokens[example["valid"]][-1]] == "[SEP]"
    assert types.tolist() == [0] * 8 + [1] * 13 + [0] * 11
    answers = []
    for i in range(3):
        first, last = found[i]["label"]
        begin, characters = found.inside(i)
        answers.append(CONTEXT[characters[first - begin, 0] : characters[last - begin, 1]])
    assert answers == ["Zoë", "opened in 1889", "89"]
    plain = source(tmp_path, length=32, types=False)[0]["inputs"]
    np.testing.assert_array_equal(plain, tokens)


def test_windows_slide_and_those_without_the_answer_say_so(tmp_path):
    """Eight pieces of question and separators leave room for 6; windows begin every 4."""
    found = source(tmp_path, paragraph(questions=[QUESTIONS[0]]), length=15, stride=4)
    assert [window[1:] for window in found.windows] == [(0, 6), (4, 6), (8, 4)]
    seen = []
    for i in range(3):
        begin, characters = found.inside(i)
        tokens = found[i]["inputs"][begin : begin + len(characters), 0]
        seen.append([PIECES[t] for t in tokens])
    assert seen[0] == ["the", "cafe", "was", "open", "##ed", "in"]
    assert seen[1][:2] == ["##ed", "in"] and seen[2] == [",", "by", "zoe", "[UNK]"]
    assert [found[i]["label"].tolist() for i in range(3)] == [[0, 0], [0, 0], [10, 10]]


def test_an_answer_that_a_window_cuts_is_not_in_it(tmp_path):
    found = source(tmp_path, paragraph(questions=[QUESTIONS[1]]), length=18, stride=2)
    inside = []
    for i, window in enumerate(found.windows):
        whole = window.first <= 3 and window.first + window.count >= 8
        assert bool(found[i]["label"].any()) == whole
        inside.append(whole)
    assert any(inside) and not all(inside)


def test_long_questions_are_cut(tmp_path):
    asked = ("q", "who " * 300, [("Zoë", 33)])
    found = source(tmp_path, paragraph(questions=[asked]), length=384)
    assert found.inside(0)[0] == 2 + 64
    short = source(tmp_path, paragraph(questions=[asked]), length=20)
    assert short.inside(0)[0] == 2 + 10 and short[0]["valid"].sum() == 20


def broken(folder, text):
    write(folder)
    (folder / "dev-v1.1.json").write_text(text)
    return Squad(str(folder), "dev", NamedTokenizer(f"{folder}/vocab.txt"))


@pytest.mark.parametrize(
    ("act", "said"),
    [
        (lambda p: len(Squad(str(p), "dev", None)), r"data\.folder: .*dev-v1\.1\.json cannot be"),
        (lambda p: Squad(str(p), "test", None), r"data\.split='test'"),
        (lambda p: Squad(str(p), "dev", None, 7), r"data\.length=7"),
        (lambda p: Squad(str(p), "dev", None, stride=0), r"data\.stride=0"),
        (lambda p: len(broken(p, "{")), r"cannot be read"),
        (lambda p: len(broken(p, '{"data": [{"paragraphs": [{}]}]}')), r"KeyError: 'qas'"),
        (lambda p: len(broken(p, "[]")), r"is not laid out as SQuAD v1\.1 is"),
        (
            lambda p: len(source(p, paragraph(questions=[("q9", "who?", [])]))),
            r"question 'q9' has no answer; give SQuAD v1\.1",
        ),
        (
            lambda p: NamedTokenizer("bytes").locate("a"),
            r"data\.tokenizer='bytes': does not tell where its tokens are",
        ),
    ],
)
def test_mistakes_are_named(tmp_path, act, said):
    with pytest.raises(ConfigError, match=said):
        act(tmp_path)
