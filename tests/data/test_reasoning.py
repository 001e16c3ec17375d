"""Generated problems: their labels are right, and rows are what they are said to be."""

import jax
import numpy as np
import pytest

from jaxformer.data.base import DeviceData
from jaxformer.data.sources.listops import OPERATORS, TOKENS, ListOps
from jaxformer.data.sources.recall import PairRecall, Recall
from jaxformer.recipe import ConfigError


def draw(rows, number=64):
    data = DeviceData(rows, number)
    return jax.tree.map(np.asarray, data.draw(data.batch(0)))


def test_every_query_has_been_answered_before():
    batch = draw(Recall(length=40, pairs=5, vocabulary=20))
    assert batch["tokens"].shape == (64, 41) and batch["weight"].shape == (64, 40)
    for tokens, weight in zip(batch["tokens"], batch["weight"], strict=True):
        keys, values = tokens[:10:2], tokens[1:10:2]
        assert len(set(keys)) == 5 and 0 < keys.min() <= keys.max() < 10 <= values.min()
        (asked,) = np.nonzero(weight)
        assert sorted(tokens[asked]) == sorted(keys) and asked.min() >= 10
        answers = dict(zip(keys, values, strict=True))
        assert all(tokens[i + 1] == answers[tokens[i]] for i in asked)


@pytest.mark.parametrize("asked", [1, 6])
def test_one_pair_has_the_key_in_question(asked):
    batch = draw(PairRecall(length=12, pairs=4, keys=5, values=3, asked=asked))
    x, label = batch["inputs"], batch["label"]
    assert x.shape == (64, 12, 9) and set(label) == {0, 1, 2}
    pairs, blank, question = x[:, :4], x[:, 4 : 12 - asked], x[:, 12 - asked :]
    assert (pairs[..., :5].sum(1) <= 1).all() and (pairs.sum(-1) == 2).all() and not blank.any()
    assert (question[..., 8] == 1).all() and (question == question[:, :1]).all()
    match = np.einsum("BPK,BK->BP", pairs[..., :5], question[:, 0, :5])
    assert (match.sum(1) == 1).all()
    found = np.einsum("BP,BPV->BV", match, pairs[..., 5:])
    assert np.array_equal(found.argmax(1), label)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ConfigError, match=r"data.asked: 9 .* allowed: 1 to 8"):
        PairRecall(length=12, pairs=4, keys=5, values=3, asked=9)
    with pytest.raises(ConfigError, match=r"data.pairs: 6 .* allowed: 1 to data.key_count=5"):
        PairRecall(length=12, pairs=6, keys=5, values=3)
    with pytest.raises(ConfigError, match=r"data.length of 40, got 39"):
        Recall(length=39, pairs=10, vocabulary=66)
    with pytest.raises(ConfigError, match="vocabulary of at least 22, got 20"):
        Recall(length=40, pairs=10, vocabulary=20)
    with pytest.raises(ConfigError, match="a length of at least 24"):
        ListOps(10, length=20)


def value_of(words):
    """The value of a list, by the grammar; takes its words off the front."""
    word = words.pop(0)
    if word.isdigit():
        return int(word)
    values = []
    while words[0] != "]":
        values.append(value_of(words))
    words.pop(0)
    return OPERATORS[word[1:]](values)


def test_lists_have_the_value_they_say():
    lists = ListOps(60, length=64, seed=3)
    for i in range(60):
        example = lists[i]
        words = [TOKENS[t] for t in example["inputs"][example["valid"]]]
        assert lists.shortest <= len(words) <= 64 and not example["inputs"][~example["valid"]].any()
        assert value_of(words) == example["label"] and not words
    assert OPERATORS["SM"]([7, 8]) == 5 and OPERATORS["MED"]([1, 9, 4, 5]) == 4
    assert len({int(lists[i]["label"]) for i in range(60)}) > 5
    assert np.array_equal(ListOps(9, 64, seed=3)[7]["inputs"], lists[7]["inputs"])
    assert np.any(ListOps(9, 64, seed=4)[7]["inputs"] != lists[7]["inputs"])
