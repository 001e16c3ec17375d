"""Small folders of GLUE and of SQuAD, in the layout of the real ones."""

import json

import numpy as np

WORDS = ["red", "cat", "dog", "sat", "ran", "on", "mat", "sun", "big", "old"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def vocabulary(folder, words=WORDS):
    """A WordPiece vocabulary of whole words: its path."""
    (folder / "vocab.txt").write_text("\n".join([*SPECIAL, *words]) + "\n")
    return f"{folder}/vocab.txt"


def pairs(count, seed=0):
    """(three words, three words, how many of the second are those of the first)."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        one = list(rng.choice(WORDS, 3, replace=False))
        same = int(rng.integers(0, 4))
        others = [word for word in WORDS if word not in one]
        found.append((" ".join(one), " ".join([*one[:same], *rng.choice(others, 3 - same)]), same))
    return found


def glue(folder, name, count=24):
    """The same examples as `train.tsv` and `dev.tsv` of a task: fields for a config."""
    lines = []
    for i, (one, two, same) in enumerate(pairs(count)):
        label = int(same > 1)
        lines.append(
            {
                "sts-b": f"{i}\tmain\tf\t2012\t1\tnone\tnone\t{one}\t{two}\t{5 * same / 3:.3f}",
                "cola": f"gj04\t{label}\t{'' if label else '*'}\t{one} {two}",
                "mrpc": f"{label}\t{i}\t{i}\t{one}\t{two}",
            }[name]
        )
    header = {
        "sts-b": "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2"
        "\tscore\n",
        "cola": "",
        "mrpc": "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n",
    }[name]
    for split in ("train", "dev"):
        (folder / f"{split}.tsv").write_text(header + "\n".join(lines) + "\n")
    return _fields(folder, name, len(SPECIAL) + len(WORDS), length=12)


def squad(folder):
    """Questions about three texts, the same to train and to test on: fields for a config."""
    texts = [
        "the red cat sat on the old mat",
        "the big dog ran to the sun and the old dog sat",
        "a red sun is on the big mat , a dog is on the sun",
    ]
    asked = [
        (0, "who sat ?", "red cat"),
        (0, "where is the cat ?", "old mat"),
        (1, "who ran ?", "big dog"),
        (1, "where is the big dog ?", "sun"),
        (2, "what is red ?", "sun"),
        (2, "who is on the sun ?", "dog"),
    ]
    words = sorted(set(" ".join([*texts, *(q for _, q, _ in asked)]).split()))
    paragraphs = []
    for number, text in enumerate(texts):
        qas = []
        for i, (which, question, answer) in enumerate(asked):
            if which == number:
                answers = [{"text": answer, "answer_start": text.rindex(answer)}]
                qas.append({"id": f"q{i}", "question": question, "answers": answers})
        paragraphs.append({"context": text, "qas": qas})
    page = {"version": "1.1", "data": [{"title": "animals", "paragraphs": paragraphs}]}
    for split in ("train", "dev"):
        (folder / f"{split}-v1.1.json").write_text(json.dumps(page))
    # Windows of 16 pieces, of a longer text two or more.
    fields = _fields(folder, "squad", len(SPECIAL) + len(words), length=20, words=words)
    return {**fields, "data__stride": 4}


def _fields(folder, task, size, length, words=WORDS):
    return {
        "data__task": task,
        "data__folder": str(folder),
        "data__tokenizer": vocabulary(folder, words),
        "data__vocabulary": size,
        "data__length": length,
        "data__test_rows": 8,
    }
