"""Encoders, image classifiers and T5 of `transformers` with random weights: read, run, written."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.interop import huggingface
from jaxformer.sampling.autoregressive import generate
from tests.interop.folders import assert_same_folder, random_model, read

transformers = pytest.importorskip("transformers")
torch = pytest.importorskip("torch")

RNG = np.random.default_rng(0)
TOKENS = RNG.integers(3, 90, (2, 12))
TYPES = RNG.integers(0, 2, (2, 12))
RIGHT = np.arange(12) < [[12], [8]]
LEFT = np.arange(12) >= [[0], [4]]
TEXT = {
    "vocab_size": 120,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 20,
}
VIT = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "image_size": 16,
    "patch_size": 4,
    "num_labels": 5,
}
SWIN = {
    "image_size": 32,
    "patch_size": 4,
    "embed_dim": 8,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "num_labels": 5,
}
DISTILBERT = {
    "vocab_size": 120,
    "dim": 16,
    "n_layers": 2,
    "n_heads": 2,
    "hidden_dim": 24,
    "max_position_embeddings": 20,
}
T5 = {
    "vocab_size": 120,
    "d_model": 16,
    "d_kv": 6,
    "d_ff": 24,
    "num_layers": 2,
    "num_decoder_layers": 3,
    "num_heads": 3,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 10,
    "decoder_start_token_id": 0,
}


def images(size):
    return RNG.normal(size=(2, size, size, 3)).astype(np.float32)


def text(valid=RIGHT, types=None):
    """(our arguments, theirs) for tokens."""
    theirs = {"input_ids": TOKENS, "attention_mask": valid.astype(int)}
    ours = {"valid_BxL": jnp.asarray(valid)}
    if types is None:
        return (TOKENS,), ours, theirs
    return (np.stack([TOKENS, types], -1),), ours, {**theirs, "token_type_ids": types}


def image(size):
    pixels = images(size)
    return (pixels,), {}, {"pixel_values": pixels.transpose(0, 3, 1, 2).copy()}


def pair():
    ours = {"valid_BxS": jnp.asarray(RIGHT)}
    theirs = {"input_ids": TOKENS, "attention_mask": RIGHT.astype(int)}
    return (TOKENS, TOKENS[:, :9]), ours, {**theirs, "decoder_input_ids": TOKENS[:, :9]}


CASES = {
    "bert words": ("BertForMaskedLM", "BertConfig", TEXT, lambda: text(types=TYPES)),
    "bert left": ("BertForMaskedLM", "BertConfig", TEXT, lambda: text(LEFT)),
    "bert": ("BertForSequenceClassification", "BertConfig", TEXT, lambda: text(types=TYPES)),
    "roberta words": ("RobertaForMaskedLM", "RobertaConfig", TEXT, text),
    "roberta": ("RobertaForSequenceClassification", "RobertaConfig", TEXT, text),
    "distilbert words": ("DistilBertForMaskedLM", "DistilBertConfig", DISTILBERT, text),
    "distilbert": ("DistilBertForSequenceClassification", "DistilBertConfig", DISTILBERT, text),
    "vit": ("ViTForImageClassification", "ViTConfig", VIT, lambda: image(16)),
    "deit": (
        "DeiTForImageClassification",
        "DeiTConfig",
        {**VIT, "qkv_bias": False},
        lambda: image(16),
    ),
    "deit distilled": (
        "DeiTForImageClassificationWithTeacher",
        "DeiTConfig",
        VIT,
        lambda: image(16),
    ),
    "swin": (
        "SwinForImageClassification",
        "SwinConfig",
        {**SWIN, "window_size": 4},
        lambda: image(32),
    ),
    "swin padded": (
        "SwinForImageClassification",
        "SwinConfig",
        {**SWIN, "window_size": 3},
        lambda: image(32),
    ),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {**T5, "feed_forward_proj": "relu"},
        pair,
    ),
    "t5 gated": (
        "T5ForConditionalGeneration",
        "T5Config",
        {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
        pair,
    ),
}


def folder_of(name, factory):
    head, config, fields, _ = CASES[name]
    config = getattr(transformers, config)(**fields)
    return random_model(getattr(transformers, head), config, factory)


@pytest.mark.parametrize("name", CASES)
def test_logits_and_round_trip(name, tmp_path_factory, tmp_path):
    model, path = folder_of(name, tmp_path_factory)
    loaded = read(path)
    arguments, ours, theirs = CASES[name][3]()
    found = loaded.port.model.apply({"params": loaded.params}, *map(jnp.asarray, arguments), **ours)
    with torch.no_grad():
        wanted = model(**{k: torch.tensor(x) for k, x in theirs.items()}).logits.numpy()
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    huggingface.save(tmp_path / "out", loaded.config, loaded.params)
    assert_same_folder(path, tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "fields"), [("Bert", TEXT), ("Roberta", TEXT), ("DistilBert", DISTILBERT)]
)
def test_where_answers_begin_and_end(name, fields, tmp_path_factory, tmp_path):
    config = getattr(transformers, f"{name}Config")(**fields)
    head = getattr(transformers, f"{name}ForQuestionAnswering")
    model, path = random_model(head, config, tmp_path_factory)
    loaded = read(path)
    arguments, ours, theirs = text(types=TYPES if name == "Bert" else None)
    task = loaded.port.make_task()
    batch = {"inputs": jnp.asarray(arguments[0]), "valid": ours["valid_BxL"]}
    found = task.predict(loaded.params, {}, batch, key=jax.random.key(0))
    with torch.no_grad():
        wanted = model(**{k: torch.tensor(x) for k, x in theirs.items()})
    for i, logits in enumerate((wanted.start_logits, wanted.end_logits)):
        np.testing.assert_allclose(found[:, i], logits.numpy(), atol=1e-4)
    huggingface.save(tmp_path / "out", loaded.config, loaded.params)
    assert_same_folder(path, tmp_path / "out")


def test_positions_of_roberta_skip_padding(tmp_path_factory):
    """It counts its positions from the first word, wherever that is."""
    model, path = folder_of("roberta words", tmp_path_factory)
    loaded = read(path)
    tokens = np.where(LEFT, TOKENS, 1)  # its padding token, by which it counts
    positions = np.maximum(np.cumsum(LEFT, 1) - 1, 0)
    found = loaded.port.model.apply(
        {"params": loaded.params},
        jnp.asarray(tokens),
        valid_BxL=jnp.asarray(LEFT),
        positions=jnp.asarray(positions),
    )
    with torch.no_grad():
        wanted = model(torch.tensor(tokens), torch.tensor(LEFT.astype(int))).logits.numpy()
    np.testing.assert_allclose(np.asarray(found)[LEFT], wanted[LEFT], atol=1e-4)


@pytest.mark.parametrize("name", ["t5", "t5 gated"])
def test_t5_writes_from_its_cache(name, tmp_path_factory):
    """Greedy texts token by token, with one memory per row, are those of `transformers`."""
    model, path = folder_of(name, tmp_path_factory)
    loaded = read(path)
    task = loaded.port.make_task()
    extra = task.reading(loaded.params, {}, TOKENS, RIGHT)
    found = generate(
        task, loaded.params, extra, [[0], [0]], length=14, temperature=0.0, key=jax.random.key(0)
    )
    with torch.no_grad():
        wanted = model.generate(
            torch.tensor(TOKENS),
            attention_mask=torch.tensor(RIGHT.astype(int)),
            max_new_tokens=14,
            do_sample=False,
            eos_token_id=-1,
            use_cache=False,  # its cache has as many layers as the encoder
        )
    assert found == wanted[:, 1:].tolist()


@pytest.mark.parametrize("name", ["bert words", "vit", "swin", "t5"])
def test_imported_models_train(name, tmp_path_factory):
    """Gradients reach every parameter of a loaded model, dropout included."""
    _, path = folder_of(name, tmp_path_factory)
    loaded = read(path)
    arguments, _, _ = CASES[name][3]()
    label = jnp.array([1, 2])
    batch = {
        "bert words": {"tokens": jnp.asarray(TOKENS)},
        "t5": {"inputs": jnp.asarray(TOKENS), "tokens": jnp.asarray(TOKENS)},
    }.get(name, {"image": jnp.asarray(arguments[0]), "label": label})
    task = loaded.port.make_task()

    def loss(params):
        return task.loss(params, {}, batch, key=jax.random.key(1), train=True).loss

    value, gradient = jax.value_and_grad(loss)(loaded.params)
    assert jnp.isfinite(value)
    zero = [
        jax.tree_util.keystr(p)
        for p, g in jax.tree_util.tree_leaves_with_path(gradient)
        if not jnp.any(g)
    ]
    assert not zero
