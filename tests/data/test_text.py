"""Text in the formats it comes in: files, tokenizers trained on the spot, the standard library."""

import io
from pathlib import Path

import numpy as np
import pytest

from jaxformer.data.base import Epoch, IndexedData
from jaxformer.data.sources.text import PYTHON_STDLIB, Windows, load_corpus
from jaxformer.data.sources.tokenizers import Bytes, load_tokenizer, save_bytes
from jaxformer.recipe import ConfigError

SAMPLE = "Was sich überhaupt sagen läßt, läßt sich klar sagen. " * 4


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_text("zwei", encoding="utf-8")
    (tmp_path / "a.txt").write_text("eins", encoding="utf-8")
    (tmp_path / "sub" / "c.txt").write_text("drei €", encoding="utf-8")
    (tmp_path / "empty.txt").touch()
    return tmp_path


@pytest.fixture(scope="module")
def tokenizer_files(tmp_path_factory):
    """One file in each of the two real formats, trained on SAMPLE."""
    import sentencepiece
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    where = tmp_path_factory.mktemp("tokenizers")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([SAMPLE], trainer)
    bpe.save(str(where / "tokenizer.json"))

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([SAMPLE]),
        model_writer=model,
        vocab_size=40,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (where / "spm.model").write_bytes(model.getvalue())
    return where


@pytest.mark.parametrize("file", [None, "tokenizer.json", "spm.model"])
def test_tokenizers_round_trip(file, tokenizer_files):
    tokenizer = load_tokenizer("bytes" if file is None else str(tokenizer_files / file))
    text = SAMPLE.strip()
    tokens = tokenizer.encode(text)
    assert tokens.ndim == 1 and tokens.max() < tokenizer.vocab_size
    assert tokenizer.decode(tokens) == text
    assert 0 <= tokenizer.end_of_text < tokenizer.vocab_size
    assert tokenizer.end_of_text not in tokens
    if file is not None:
        assert len(tokens) < len(text.encode())


def test_bytes_as_a_file_are_the_same_bytes(tmp_path):
    save_bytes(tmp_path / "tokenizer.json")
    file = load_tokenizer(str(tmp_path))
    text = SAMPLE + "\x00\x7f\t\n  ≠🙂"
    np.testing.assert_array_equal(file.encode(text), Bytes().encode(text))
    assert file.decode(Bytes().encode(text)) == text
    assert (file.vocab_size, file.end_of_text) == (257, 256)


def test_bytes_survive_a_cut_inside_a_character():
    tokens = Bytes().encode("€5")
    assert Bytes().vocab_size == 257
    assert Bytes().decode([*tokens[2:], 256]) == "\ufffd5"


def test_files_are_sorted_and_each_is_ended(folder):
    corpus = load_corpus(str(folder / "**" / "*.txt"), validation=0.0)
    expected = [*b"eins", 256, *b"zwei", 256, *"drei €".encode(), 256]
    np.testing.assert_array_equal(corpus.train, expected)
    assert len(corpus.validation) == 0
    both = load_corpus([str(folder / "a.txt"), str(folder / "[ab].txt")], validation=0.0)
    np.testing.assert_array_equal(both.train, expected[:10])  # a file matched twice counts once


def test_validation_is_the_tail_or_files_of_its_own(folder):
    tail = load_corpus(str(folder / "[ab].txt"), validation=0.3)
    assert Bytes().decode(tail.train) + Bytes().decode(tail.validation) == "einszwei"
    assert len(tail.validation) == 3
    files = load_corpus(str(folder / "a.txt"), validation=[str(folder / "b.txt")])
    assert (Bytes().decode(files.train), Bytes().decode(files.validation)) == ("eins", "zwei")


@pytest.mark.parametrize("file", ["bytes", "tokenizer.json"])
def test_cache_is_written_once_and_follows_the_files(file, folder, tokenizer_files, tmp_path):
    spec = file if file == "bytes" else str(tokenizer_files / file)
    cache = tmp_path / "cache"

    def load():
        return load_corpus(str(folder / "*.txt"), spec, validation=0.0, cache=cache).train

    first = load()
    assert isinstance(first, np.memmap)
    np.testing.assert_array_equal(
        first, load_corpus(str(folder / "*.txt"), spec, validation=0.0).train
    )
    (entry,) = cache.iterdir()
    written = entry.stat().st_mtime_ns
    load()
    assert entry.stat().st_mtime_ns == written
    (folder / "a.txt").write_text("another text")
    assert len(load()) != len(first)
    assert len(list(cache.iterdir())) == 2


def test_the_standard_library_is_text_that_every_machine_has():
    corpus = load_corpus(PYTHON_STDLIB)
    assert len(corpus.train) > 5_000_000
    assert len(corpus.validation) == pytest.approx(len(corpus.train) / 9, rel=1e-6)
    again = load_corpus(PYTHON_STDLIB)
    np.testing.assert_array_equal(again.validation, corpus.validation)
    assert "import " in Bytes().decode(corpus.validation[:50_000])


def test_windows_train_on_every_start_and_evaluate_each_token_once():
    tokens = np.arange(100, 131, dtype=np.uint16)
    training = Windows(tokens, length=10)
    assert len(training) == 21
    np.testing.assert_array_equal(training[20]["tokens"], np.arange(120, 131))
    evaluation = Epoch(Windows(tokens, length=10, stride=10), batch_size=2)
    batches = [evaluation.batch(k) for k in range(len(evaluation))]
    rows = np.concatenate([b["tokens"][b["weight"] == 1] for b in batches])
    np.testing.assert_array_equal(rows[:, 1:].ravel(), tokens[1:])
    batch = IndexedData(training, 4).batch(0)["tokens"]
    assert batch.shape == (4, 11) and batch.dtype == np.int32
    assert (np.diff(batch) == 1).all()


def load(text=None, **more):
    return lambda folder: load_corpus(str(folder / (text or "a.txt")), **more)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (load("none*.txt"), r"data\.text: no file matches .*none\*\.txt'; give globs"),
        (load("empty.txt"), r"data\.text: .*empty\.txt' is empty; give files"),
        (load("latin.txt"), r"data\.text: .*latin\.txt' is not UTF-8 \(byte 1\); convert"),
        (load(validation=1.0), r"data\.validation: 1\.0; give a fraction"),
        (load(validation="none"), r"data\.text: no file matches 'none'"),
        (load(tokenizer="gpt2"), r"data\.tokenizer: 'gpt2' is not a file .* give 'bytes'"),
        (load(cache="/dev/null/x"), r"data\.cache: cannot write to '/dev/null/x'"),
        (lambda f: load_tokenizer(str(f / "no.json")), r"data\.tokenizer: .*no\.json' is not a"),
        (lambda f: load_tokenizer(str(f / "bad.json")), r"data\.tokenizer: cannot read .*bad\.js"),
        (lambda f: load_tokenizer(str(f / "bad.model")), r"data\.tokenizer: cannot read .*bad\.m"),
        (lambda f: Windows(np.zeros(5), 5), r"data\.length: a window of 5 \+ 1 tokens exceeds"),
        (lambda f: Windows(np.zeros(5), 0), r"data\.length: 0"),
    ],
)
def test_bad_input_is_named(make, says, folder):
    (folder / "latin.txt").write_bytes("bär".encode("latin-1"))
    (folder / "bad.json").write_text("{")
    (folder / "bad.model").write_bytes(b"no model")
    with pytest.raises(ConfigError, match=says) as raised:
        make(folder)
    assert "\n" not in str(raised.value)


def test_unreadable_file_is_named(folder, monkeypatch):
    def refuse(self, *args, **kwargs):  # chmod would not stop a test that runs as root
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(ConfigError, match=r"data\.text: cannot read .*a\.txt' \(Permission denied"):
        load_corpus(str(folder / "a.txt"))
