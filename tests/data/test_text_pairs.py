"""Sentence pairs: entailment made by rule, and the files of GLUE."""

import numpy as np
import pytest

from jaxformer.data.sources import entailment, glue
from jaxformer.data.sources.entailment import Entailment
from jaxformer.data.sources.glue import Glue
from jaxformer.recipe import ConfigError

# -------------------------------------------------------------------------------- entailment


def read(example):
    """The facts of the premise, and the hypothesis."""
    tokens = example["inputs"][example["valid"]].tolist()
    assert tokens[0] == entailment.CLS and tokens[-1] == entailment.SEP
    middle = tokens.index(entailment.SEP)
    premise = tokens[1:middle]
    facts = [tuple(premise[i : i + 3]) for i in range(0, len(premise), 4)]
    assert all(premise[i] == entailment.AND for i in range(3, len(premise), 4))
    return facts, tuple(tokens[middle + 1 : -1])


def answer(facts, hypothesis):
    """By the meaning of the words alone."""
    if hypothesis in facts:
        return "entail"
    entity, attribute, _ = hypothesis
    same = [fact for fact in facts if fact[:2] == (entity, attribute)]
    return "contradict" if same else "neutral"


@pytest.mark.parametrize("facts", [1, 4])
def test_labels_are_exact_and_all_occur(facts):
    source = Entailment(600, seed=3, facts=facts)
    counts = dict.fromkeys(entailment.LABELS, 0)
    for i in range(len(source)):
        said, hypothesis = read(source[i])
        assert len(set(said)) == len({fact[:2] for fact in said}) == facts
        label = entailment.LABELS[source[i]["label"]]
        assert label == answer(said, hypothesis)
        entity, attribute, value = hypothesis
        assert entailment.FIRST_ENTITY <= entity < entailment.FIRST_ATTRIBUTE
        assert entailment.FIRST_ATTRIBUTE <= attribute < entailment.FIRST_VALUE <= value
        assert (value - entailment.FIRST_VALUE) // 2 == attribute - entailment.FIRST_ATTRIBUTE
        counts[label] += 1
    assert min(counts.values()) > 150
    assert value < entailment.VOCABULARY


def test_near_pairs_have_an_attribute_of_others():
    for near, share in ((0.0, 0.0), (1.0, 1.0)):
        source = Entailment(200, near=near)
        found = []
        for i in range(len(source)):
            said, (_, attribute, _) = read(source[i])
            if source[i]["label"] == 2:
                found.append(attribute in [fact[1] for fact in said])
        assert np.mean(found) == share


def test_examples_depend_on_seed_and_number_alone():
    one, later = Entailment(50, seed=1), Entailment(20, seed=1, start=30)
    np.testing.assert_array_equal(one[35]["inputs"], later[5]["inputs"])
    assert (Entailment(50, seed=2)[35]["inputs"] != one[35]["inputs"]).any()
    assert one[0]["inputs"].shape == (24,) and one[0]["valid"].sum() == one.used == 21


# -------------------------------------------------------------------------------------- GLUE

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat", "sat", "on", "the", "mat", '"']
FILES = {
    "cola": ("", "gj04\t1\t\ta cat sat\nks08\t0\t*\tsat a cat"),
    "sst-2": ("sentence\tlabel", "a cat \t1\nthe mat\t0"),
    "mrpc": (
        "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String",
        '1\t7\t8\ta "cat\tthe cat\n0\t1\t2\ta\tb',
    ),
    "sts-b": (
        "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore",
        "0\tmain\tf\t2012\t1\tnone\tnone\ta cat\tthe cat\t4.750",
    ),
    "qqp": (
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate",
        "1\t2\t3\ta cat\tthe cat\t1\n4\t5\tbroken\n6\t7\t8\ta\tmat\t0",
    ),
    "mnli": (
        "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\t"
        "sentence1_parse\tsentence2_parse\tsentence1\tsentence2\tlabel1\tgold_label",
        "0\t1\t2\tfiction\t(\t(\t(\t(\ta cat\tthe mat\tneutral\tneutral",
    ),
    "qnli": ("index\tquestion\tsentence\tlabel", "0\ta cat\tthe mat\tnot_entailment"),
    "rte": ("index\tsentence1\tsentence2\tlabel", "0\ta cat\tthe mat\tentailment"),
    "wnli": ("index\tsentence1\tsentence2\tlabel", "0\ta cat\tthe mat\t1"),
}


class Words:
    """A tokenizer of whole words."""

    vocab_size, begin_of_text, end_of_text = len(WORDS), (2,), 3

    def encode(self, text):
        return np.asarray([WORDS.index(w) if w in WORDS else 1 for w in text.split()], np.int32)


def folder(tmp_path, name, split="dev", text=None):
    header, rows = FILES[name]
    lines = text if text is not None else "\n".join(filter(None, [header, rows])) + "\n"
    file = "train.tsv" if split == "train" else glue.TASKS[name].dev
    (tmp_path / file).write_text(lines)
    return str(tmp_path)


@pytest.mark.parametrize(
    ("name", "label", "sentences"),
    [
        ("cola", [1, 0], ("a cat sat",)),
        ("sst-2", [1, 0], ("a cat ",)),
        ("mrpc", [1, 0], ('a "cat', "the cat")),
        ("sts-b", [4.75], ("a cat", "the cat")),
        ("qqp", [1, 0], ("a cat", "the cat")),
        ("mnli", [2], ("a cat", "the mat")),
        ("qnli", [1], ("a cat", "the mat")),
        ("rte", [0], ("a cat", "the mat")),
        ("wnli", [1], ("a cat", "the mat")),
    ],
)
@pytest.mark.parametrize("split", ["train", "dev"])
def test_every_layout_is_read(tmp_path, name, label, sentences, split):
    source = Glue(name, folder(tmp_path, name, split), split, Words(), 12)
    assert [source[i]["label"] for i in range(len(source))] == label
    assert source.lines[0][0] == sentences
    for key, (shape, dtype) in glue.row(name, 12).items():
        assert source[0][key].shape == shape and source[0][key].dtype == dtype


def test_pairs_are_joined_and_cut(tmp_path):
    rows = "0\ta cat sat on the mat\ta mat\tentailment"
    text = f"{FILES['rte'][0]}\n{rows}\n"
    where = folder(tmp_path, "rte", text=text)
    whole = Glue("rte", where, "dev", Words(), 12)[0]
    tokens, types = whole["inputs"].T
    assert tokens.tolist() == [2, 5, 6, 7, 8, 9, 10, 3, 5, 10, 3, 0]
    assert types.tolist() == [0] * 8 + [1] * 3 + [0]
    assert whole["valid"].tolist() == [True] * 11 + [False]
    short = Glue("rte", where, "dev", Words(), 8, types=False)[0]
    assert short["inputs"].tolist() == [2, 5, 6, 7, 3, 5, 10, 3]  # the longer one is cut


@pytest.mark.parametrize(
    ("act", "said"),
    [
        (
            lambda p: Glue("rte", str(p), "dev", Words())[0],
            r"data\.folder: .*dev\.tsv cannot be read",
        ),
        (lambda p: Glue("glue", str(p), "dev", Words()), r"data\.task='glue': must be one of cola"),
        (lambda p: Glue("rte", str(p), "test", Words()), r"data\.split='test'"),
        (lambda p: Glue("rte", str(p), "dev", Words(), 4), r"data\.length=4"),
        (
            lambda p: len(Glue("rte", folder(p, "rte", text="a\tb\n1\t2\n"), "dev", Words())),
            r"has no column 'sentence1'",
        ),
        (
            lambda p: len(
                Glue(
                    "rte",
                    folder(p, "rte", text=f"{FILES['rte'][0]}\n0\ta\tb\tyes\n"),
                    "dev",
                    Words(),
                )
            ),
            r"line 2: the label 'yes' is not one of entailment, not_entailment",
        ),
        (
            lambda p: len(
                Glue("rte", folder(p, "rte", text=f"{FILES['rte'][0]}\n0\ta\n"), "dev", Words())
            ),
            r"line 2: has 2 columns, too few",
        ),
        (lambda p: Entailment(4, facts=9), r"data\.facts=9"),
        (lambda p: Entailment(4, length=20), r"data\.length=20: 4 facts need 21"),
        (lambda p: Entailment(4, near=1.5), r"data\.near=1\.5"),
    ],
)
def test_mistakes_are_named(tmp_path, act, said):
    with pytest.raises(ConfigError, match=said):
        act(tmp_path)
