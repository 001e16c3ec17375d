"""Checkpoints of every kind: examined, watched, imported, exported, converted."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

import jaxformer
from jaxformer.cli import main
from jaxformer.data.sources.tokenizers import Bytes
from jaxformer.errors import ConfigError
from jaxformer.interop.tensors import open_tensors
from jaxformer.tools.convert import convert, export, import_folder
from jaxformer.tools.evaluate import evaluate, watch, write_results
from jaxformer.tools.restack import restack
from jaxformer.tools.subject import open_subject, run_config
from jaxformer.train.fit import FitOptions, fit

QUIET = FitOptions(progress=False, checkpoint_every=4, keep=None)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """12 steps of the plain decoder, with an EMA, saved every fourth."""
    workdir = tmp_path_factory.mktemp("runs") / "decoder"
    recipe = jaxformer.load("decoder:tiny", steps=12, gradient__ema=0.5, evaluate__batches=1)
    fit(recipe, workdir=workdir, options=QUIET)
    return workdir


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "a.txt"
    path.write_text("To be, or not to be, that is the question: " * 30)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Hugging Face folder of a byte-level GPT-2 with its tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    transformers = pytest.importorskip("transformers")
    path = tmp_path_factory.mktemp("folders") / "gpt2"
    config = transformers.GPT2Config(
        vocab_size=257, n_embd=32, n_layer=2, n_head=2, n_positions=64, bos_token_id=256
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(path)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate(alphabet)} | {"<|endoftext|>": 256}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(path / "tokenizer.json"))
    return path


def test_runs_and_folders_side_by_side(run, folder, text, tmp_path, capsys):
    questions = tmp_path / "exam.jsonl"
    lines = [
        {"question": "To be, or not", "choices": ["to be", "xq zv"], "answer": 0},
        {"question": "That is", "choices": ["the question", "vv"], "answer": "A"},
        {"question": "To", "choices": [" be,", " qq"], "answer": " be,"},
    ]
    questions.write_text("\n".join(map(json.dumps, lines)))
    out = tmp_path / "out"
    arguments = ["evaluate", str(run), str(folder), "--steps", "all", "--text", str(text)]
    arguments += ["--choices", str(questions), "--length", "32", "--output", str(out)]
    assert main(arguments) == 0
    rows = json.loads((out / "evaluation.json").read_text())
    assert [(r["checkpoint"], r["step"]) for r in rows] == [
        ("decoder", 4),
        ("decoder", 8),
        ("decoder", 12),
        ("gpt2", 0),
    ]
    for row in rows:
        # Both models read bytes, so that nats per token are bits per byte.
        assert row["text/bits_per_byte"] == pytest.approx(row["text/loss"] / np.log(2), rel=0.01)
        assert row["text/perplexity"] == pytest.approx(np.exp(row["text/loss"]))
        assert 0 <= row["choices/accuracy"] <= 1
    assert rows[2]["text/loss"] < rows[0]["text/loss"]
    assert (out / "evaluation.png").stat().st_size > 5000
    assert "| decoder | 12 |" in (out / "evaluation.md").read_text()
    again = evaluate(
        [run, folder], steps="all", exams=[jaxformer.Perplexity(str(text), 32, batch=16)]
    )
    for row, other in zip(rows, again, strict=True):
        assert row["text/loss"] == pytest.approx(other["text/loss"], rel=1e-5), "batches of 16"


def test_choices_score_the_likelihood_of_the_choice_alone(run, tmp_path):
    """Against the sum over single tokens, each predicted from what stands before it."""
    question, choices = "def f(x): return", ["x", "x + 1", "the"]
    file = tmp_path / "one.jsonl"
    subject = open_subject(run)
    scores = []
    for choice in choices:
        tokens = Bytes().encode(f"{question} {choice}").astype(int)
        batch = {"tokens": jnp.asarray(tokens)[None]}
        logits = subject.task.predict(subject.state.params, {}, batch, key=jax.random.key(0))
        p = jax.nn.log_softmax(logits[0])
        n = len(question)
        scores.append(sum(float(p[i - 1, tokens[i]]) for i in range(n, len(tokens))))
    for answer in range(3):
        line = {"question": question, "choices": choices, "answer": answer}
        file.write_text(json.dumps(line))
        found = subject.take(jaxformer.MultipleChoice(str(file)))
        assert found["choices/accuracy"] == float(np.argmax(scores) == answer)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ({"question": "q", "choices": ["a"], "answer": 0}, "two or more"),
        ({"question": "q", "choices": ["a", "b"], "answer": 2}, "answer 2 must be the number"),
        ({"question": "q", "choices": ["a", "b"], "answer": "zz"}, "answer 'zz' must be"),
        ({"question": "q", "choices": ["a", "b"]}, "line 1: needs an object with 'answer'"),
        ([1], "line 1: needs an object"),
    ],
)
def test_bad_questions(run, tmp_path, line, said):
    file = tmp_path / "bad.jsonl"
    file.write_text(json.dumps(line))
    with pytest.raises(ConfigError, match=said):
        evaluate(run, exams=[jaxformer.MultipleChoice(str(file))])


def test_images(tmp_path):
    """An imported ViT on a folder whose sub-folders bear its own names of the classes."""
    from PIL import Image

    transformers = pytest.importorskip("transformers")
    names = {0: "red", 1: "green", 2: "blue"}
    config = transformers.ViTConfig(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        image_size=8,
        patch_size=4,
        id2label=names,
    )
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    page = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.6, 0.7]}
    (tmp_path / "vit" / "preprocessor_config.json").write_text(json.dumps(page))
    rng = np.random.default_rng(0)
    for name in names.values():
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(4):
            pixels = rng.integers(0, 255, (8, 8, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{i}.png")
    exam = jaxformer.ImageAccuracy(str(tmp_path / "images"))
    (row,) = evaluate(tmp_path / "vit", exams=[exam])
    subject = open_subject(tmp_path / "vit")
    right = []
    for label, name in names.items():
        for path in sorted((tmp_path / "images" / name).iterdir()):
            pixels = np.asarray(Image.open(path), np.float32) / 255
            image = (pixels - np.float32(page["image_mean"])) / np.float32(page["image_std"])
            logits = subject.task.predict(
                subject.state.params, {}, {"image": image[None]}, key=jax.random.key(0)
            )
            right.append(int(logits.argmax()) == label)
    assert row["images/accuracy"] == pytest.approx(np.mean(right))
    run = import_folder(tmp_path / "vit", tmp_path / "run")
    (again,) = evaluate(run, exams=[exam])
    assert again["images/loss"] == pytest.approx(row["images/loss"], rel=1e-6)


def test_an_exam_of_another_kind_is_refused(run, tmp_path):
    with pytest.raises(ConfigError, match="images: needs an image classifier; decoder is scored"):
        evaluate(run, exams=[jaxformer.ImageAccuracy("digits")])


def test_watching_survives_the_jobs_deletions(run, text, tmp_path):
    """Checkpoints appear and go while it looks; each that can be read is measured once."""
    live = tmp_path / "live"
    shutil.copytree(run, live)
    shutil.rmtree(live / "checkpoints" / "8")
    shutil.rmtree(live / "checkpoints" / "12")
    naps = []

    def sleep(seconds):
        naps.append(seconds)
        if len(naps) == 1:
            shutil.rmtree(live / "checkpoints" / "4")
        elif len(naps) == 2:
            shutil.copytree(run / "checkpoints" / "12", live / "checkpoints" / "12")

    exam = jaxformer.Perplexity(str(text), 32)
    rows = list(watch(live, exams=[exam], until=12, sleep=sleep))
    assert [row["step"] for row in rows] == [4, 12]
    assert write_results(rows, tmp_path / "out")[0].is_file()


def test_a_folder_becomes_a_run_that_trains_and_goes_back(folder, tmp_path, capsys):
    run = tmp_path / "run"
    assert main(["import", str(folder), "--workdir", str(run)]) == 0
    config = run_config(run)
    assert config.data.tokenizer == str(run / "tokenizer")
    assert main(["export", str(run), str(tmp_path / "same")]) == 0
    theirs, ours = open_tensors(folder), open_tensors(tmp_path / "same")
    for name in theirs.names:
        np.testing.assert_array_equal(theirs.read(name), ours.read(name))
    assert (tmp_path / "same" / "tokenizer.json").is_file()
    assert "| parameters | " in (tmp_path / "same" / "README.md").read_text()

    config = ConfigDict(config.to_dict())
    config.steps, config.evaluate.batches = 4, 1
    recipe = jaxformer.catalogue.build(config)
    state = fit(recipe, workdir=run, options=QUIET)
    assert int(state.step) == 4
    assert main(["export", str(run), str(tmp_path / "trained")]) == 0
    trained = open_tensors(tmp_path / "trained")
    assert any((theirs.read(n) != trained.read(n)).any() for n in theirs.names)
    transformers = pytest.importorskip("transformers")
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "trained")
    sample = ["sample", "--workdir", str(tmp_path / "trained"), "--prompt", "To be", "--length"]
    capsys.readouterr()
    assert main([*sample, "5", "--temperature", "0", "--stream"]) == 0
    streamed = capsys.readouterr().out
    assert main([*sample, "5", "--temperature", "0"]) == 0
    assert capsys.readouterr().out == streamed
    assert main([*sample, "5", "--prompt", "b", "--stream"]) == 2
    assert "shows one text as it grows, got 2 prompts" in capsys.readouterr().err


def test_exports_and_conversions_of_a_run(run, text, tmp_path):
    exam = jaxformer.Perplexity(str(text), 32, batch=8)

    def loss(path):
        return evaluate(path, exams=[exam])[0]["text/loss"]

    export(run, tmp_path / "released")
    again = import_folder(tmp_path / "released", tmp_path / "again")
    assert loss(again) == pytest.approx(loss(run), abs=1e-6)
    stacked = restack(run, tmp_path / "stacked", "stacked")
    assert run_config(stacked).model.scan and loss(stacked) == pytest.approx(loss(run), abs=1e-5)
    unrolled = restack(stacked, tmp_path / "unrolled", "unrolled")
    assert loss(unrolled) == pytest.approx(loss(run), abs=1e-5)
    # The averaged weights are the EMA's; the raw ones are those of the last step.
    raw = open_subject(convert(run, tmp_path / "raw", weights="raw")).state.params
    kept = open_subject(convert(run, tmp_path / "kept")).state.params
    assert any((a != b).any() for a, b in zip(*map(jax.tree.leaves, (raw, kept)), strict=True))
    mean = open_subject(convert(run, tmp_path / "mean", steps="8:12", weights="raw")).state.params
    eighth = open_subject(convert(run, tmp_path / "8", steps="8", weights="raw")).state.params
    for m, a, b in zip(*map(jax.tree.leaves, (mean, eighth, raw)), strict=True):
        np.testing.assert_allclose(m, (a + b) / 2, rtol=1e-6)
    half = convert(run, tmp_path / "half", dtype="bfloat16")
    assert loss(half) == pytest.approx(loss(run), abs=0.02)


@pytest.mark.parametrize(
    ("act", "said"),
    [
        (lambda run, out: import_folder(run, out), "has neither config.json nor jaxformer.json"),
        (lambda run, out: restack(run, out, "flat"), "must be one of stacked, unrolled"),
        (lambda run, out: restack(run, out, "unrolled"), "are unrolled already"),
        (lambda run, out: convert(run, run), "exists already; give a new folder"),
        (lambda run, out: export(run, out, steps="5:7"), "names no checkpoint; saved: 4, 8, 12"),
    ],
)
def test_mistakes_leave_nothing_behind(run, tmp_path, act, said):
    with pytest.raises(ConfigError, match=said):
        act(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_tokenizers_that_disagree_with_the_model(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "odd")
    page = json.loads((folder / "config.json").read_text())
    tokens = json.loads((folder / "tokenizer.json").read_text())
    tokens["model"]["vocab"]["zzz"] = 257
    (tmp_path / "odd" / "tokenizer.json").write_text(json.dumps(tokens))
    assert page["vocab_size"] == 257
    with pytest.raises(ConfigError, match="its tokenizer has 258 tokens, the model embeds 257"):
        open_subject(tmp_path / "odd")
