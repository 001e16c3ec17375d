"""Readers against 10,000 damaged and hostile files: one clear error, or what was written."""

import io
import json
import random
import resource
import struct
import sys

import numpy as np
import pytest

from jaxformer.errors import ConfigError
from jaxformer.interop.huggingface import port_of
from jaxformer.interop.layout import Layout, Rule
from jaxformer.interop.tensors import INDEX, SINGLE, open_tensors, read_json

ARRAYS = {
    "w": np.arange(12, dtype=np.float32).reshape(3, 4),
    "b": np.ones(4, np.float16),
    "n": np.arange(5, dtype=np.int32),
}
LAYOUT = Layout((Rule("w", "w", "o i -> i o"), Rule("b", "b"), Rule("n", "n")))
PARAMS = {"w": np.zeros((4, 3)), "b": np.zeros(4), "n": np.zeros(5)}
NUMBERS = (-1, 0, 1, 7, 2**31, 2**53, 2**63 - 1, 2**64, 1e308, -0.5)
VALUES = (*NUMBERS, None, True, "", "../../etc/passwd", "F32", [], {}, [[]], "x" * 1000)
TINY = {
    "vocab_size": 11,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 8,
}
CONFIGS = [
    {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **TINY},
    {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        **TINY,
        "rope_scaling": {"rope_type": "yarn", "factor": 2.0},
        "use_sliding_window": True,
        "sliding_window": 4,
    },
    {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": 11,
        "n_embd": 8,
        "n_layer": 1,
        "n_head": 2,
    },
    {"model_type": "bert", "architectures": ["BertForMaskedLM"], **TINY},
    {"model_type": "vit", "architectures": ["ViTForImageClassification"], **TINY},
    {
        "model_type": "swin",
        "architectures": ["SwinForImageClassification"],
        "depths": [1, 1],
        "num_heads": [1, 2],
        "embed_dim": 8,
        "image_size": 32,
        "window_size": 2,
    },
    {
        "model_type": "t5",
        "architectures": ["T5ForConditionalGeneration"],
        "vocab_size": 11,
        "d_model": 8,
        "d_kv": 4,
        "d_ff": 8,
        "num_layers": 1,
        "num_heads": 2,
    },
]


@pytest.fixture(autouse=True)
def no_memory_spike():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    unit = 1 if sys.platform == "darwin" else 1024
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit
    assert grown < 256 * 2**20, f"{grown / 2**20:.0f} MiB"


def bytes_of(arrays):
    from safetensors.numpy import save

    return save(arrays)


def damage(data: bytes, rng: random.Random) -> bytes:
    """Bits flipped, bytes replaced, inserted, removed, cut or repeated."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        at = rng.randrange(len(data)) if data else 0
        kind = rng.randrange(6)
        if kind == 0 and data:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[at : at + 1] = rng.randbytes(rng.randrange(9))
        elif kind == 2:
            del data[at : at + rng.randrange(1, 64)]
        elif kind == 3:
            del data[at:]
        elif kind == 4:
            data[at:at] = data[at : at + rng.randrange(64)]
        elif len(data) >= 8:
            data[:8] = struct.pack("<Q", rng.choice((0, 1, len(data), 2**32, 2**63, 2**64 - 1)))
    return bytes(data)


def twist(page, rng: random.Random):
    """A JSON page with one value somewhere in it replaced, removed, repeated or added."""
    page = json.loads(json.dumps(page))
    node = page
    while True:
        if isinstance(node, dict) and node:
            key = rng.choice(list(node))
        elif isinstance(node, list) and node:
            key = rng.randrange(len(node))
        else:
            return page
        if isinstance(node[key], dict | list) and node[key] and rng.random() < 0.7:
            node = node[key]
            continue
        kind = rng.randrange(4)
        if kind == 0:
            del node[key]
        elif kind == 1 and isinstance(node, dict):
            node[str(rng.choice(VALUES))] = node[key]
        else:
            node[key] = rng.choice(VALUES)
        return page


def read_all(path):
    """Everything a loader does with the file, after the shapes of the model are known."""
    tensors = open_tensors(path)
    found = LAYOUT.read(tensors, PARAMS)
    assert {name: x.shape for name, x in found.items()} == {
        name: x.shape for name, x in PARAMS.items()
    }


def is_refused(act, *arguments) -> bool:
    """Whether it raised the one error that readers raise, in one line that is not too long."""
    try:
        act(*arguments)
    except ConfigError as error:
        assert 10 < len(str(error)) < 3000
        return True
    return False


def test_damaged_safetensors(tmp_path):
    whole, rng, path = bytes_of(ARRAYS), random.Random(0), tmp_path / "x.safetensors"
    path.write_bytes(whole)
    read_all(path)
    refused = 0
    for _ in range(4000):
        path.write_bytes(damage(whole, rng))
        refused += is_refused(read_all, path)
    assert refused > 3000  # the others lie in the values, where any bits are a number


def test_hostile_headers(tmp_path):
    """Valid JSON that lies: shapes, types and offsets of every kind."""
    whole, rng, path = bytes_of(ARRAYS), random.Random(1), tmp_path / "x.safetensors"
    (size,) = struct.unpack("<Q", whole[:8])
    header, body = json.loads(whole[8 : 8 + size]), whole[8 + size :]
    refused = 0
    for _ in range(2500):
        page = json.dumps(twist(header, rng)).encode()
        path.write_bytes(struct.pack("<Q", len(page)) + page + body)
        refused += is_refused(read_all, path)
    assert refused > 2000


def test_hostile_indices(tmp_path):
    """Folders whose index points out of the folder, to nothing, or to another tensor's file."""
    (tmp_path / "a.safetensors").write_bytes(bytes_of({"w": ARRAYS["w"]}))
    (tmp_path / "b.safetensors").write_bytes(bytes_of({k: ARRAYS[k] for k in ("b", "n")}))
    index = {"weight_map": {"w": "a.safetensors", "b": "b.safetensors", "n": "b.safetensors"}}
    page = tmp_path / INDEX
    page.write_text(json.dumps(index))
    read_all(tmp_path)
    rng = random.Random(2)
    refused = 0
    for i in range(1500):
        text = json.dumps(twist(index, rng)).encode()
        page.write_bytes(damage(text, rng) if i % 3 == 0 else text)
        refused += is_refused(read_all, tmp_path)
    assert refused > 1200  # the others lack the name of a tensor whose file another names
    index["weight_map"]["w"] = "../a.safetensors"
    page.write_text(json.dumps(index))
    with pytest.raises(ConfigError, match=r"must be the plain name of a \.safetensors file"):
        open_tensors(tmp_path)


def test_damaged_npz(tmp_path):
    file, rng, path = io.BytesIO(), random.Random(3), tmp_path / "x.npz"
    np.savez(file, **ARRAYS)
    for _ in range(1000):
        path.write_bytes(damage(file.getvalue(), rng))
        is_refused(read_all, path)
    np.savez(path, w=np.array([{}], object))
    with pytest.raises(ConfigError, match="not a readable npz file"):  # a pickle is not opened
        open_tensors(path)


def test_hostile_configs(tmp_path):
    """Any field of any config may be anything: a model, or an error that names it."""
    rng, page = random.Random(4), tmp_path / "config.json"

    def build(text):
        page.write_bytes(text)
        port_of(read_json(page), str(page))

    refused = 0
    for i in range(2000):
        config = rng.choice(CONFIGS)
        config = twist(config, rng)
        text = json.dumps(config).encode()
        refused += is_refused(build, damage(text, rng) if i % 4 == 0 else text)
    assert refused > 800


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"w": ARRAYS["w"], "b": ARRAYS["b"]}, "tensor 'n' is missing"),
        ({**ARRAYS, "z": ARRAYS["b"]}, "tensor 'z' is unknown to this model"),
        ({**ARRAYS, "w": ARRAYS["w"].T.copy()}, r"'w' has shape \(4, 3\), the config makes it"),
        ({**ARRAYS, "b": np.array([1, np.nan, 1, 1], np.float16)}, "'b' has 1 values that are not"),
    ],
)
def test_what_is_wrong_is_named_with_its_file(tmp_path, arrays, said):
    path = tmp_path / SINGLE
    path.write_bytes(bytes_of(arrays))
    with pytest.raises(ConfigError, match=said) as caught:
        read_all(tmp_path)
    assert str(path) in str(caught.value)


def test_a_pickle_is_never_opened(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    with pytest.raises(ConfigError, match="a pickle: convert it to safetensors"):
        open_tensors(tmp_path)
    pytest.importorskip("torch")
    with pytest.raises(ConfigError, match="torch cannot read it as weights alone"):
        open_tensors(tmp_path / "pytorch_model.bin")
