"""Decoders of `transformers` with random weights: read, run, cached and written back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.interop import huggingface
from jaxformer.kernels.attention import Causal, KeyPadding
from jaxformer.sampling.autoregressive import generate
from tests.interop.folders import assert_same_folder, random_model, read

transformers = pytest.importorskip("transformers")
torch = pytest.importorskip("torch")

SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def llama(**rope):
    parameters = {"rope_theta": 500.0, **rope} if rope else None
    return transformers.LlamaConfig(**SIZES, rope_parameters=parameters)


CONFIGS = {
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=99,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "gpt2 untied": lambda: transformers.GPT2Config(
        vocab_size=99,
        n_embd=32,
        n_layer=1,
        n_head=2,
        n_inner=40,
        activation_function="relu",
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "llama 2": llama,
    "llama biased": lambda: transformers.LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "linear": lambda: llama(rope_type="linear", factor=2.0),
    "dynamic": lambda: llama(rope_type="dynamic", factor=2.0),
    "llama 3": lambda: llama(
        rope_type="llama3",
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=16,
    ),
    "yarn": lambda: llama(rope_type="yarn", factor=2.0, original_max_position_embeddings=16),
    "mistral": lambda: transformers.MistralConfig(**SIZES, sliding_window=7, head_dim=16),
    "qwen2": lambda: transformers.Qwen2Config(
        **SIZES,
        tie_word_embeddings=True,
        use_sliding_window=True,
        sliding_window=7,
        max_window_layers=1,
    ),
}


@pytest.fixture(scope="module", params=CONFIGS)
def folder(request, tmp_path_factory):
    """A model of `transformers` and the folder it was saved to."""
    return random_model(
        transformers.AutoModelForCausalLM, CONFIGS[request.param](), tmp_path_factory
    )


@pytest.fixture
def tokens(folder):
    # Longer than `max_position_embeddings`, where the scalings of RoPE differ.
    return np.random.default_rng(0).integers(3, 99, (2, 40))


def theirs(model, tokens, **kwargs):
    with torch.no_grad():
        return model(torch.tensor(tokens), **kwargs).logits.numpy()


def test_logits(folder, tokens):
    model, path = folder
    loaded = read(path)
    ours = loaded.port.model.apply({"params": loaded.params}, jnp.asarray(tokens))
    np.testing.assert_allclose(ours, theirs(model, tokens), atol=1e-4)


def test_left_padding(folder, tokens):
    model, path = folder
    loaded = read(path)
    valid = np.arange(40) >= np.array([[0], [9]])
    positions = np.maximum(np.cumsum(valid, axis=1) - 1, 0)
    ours = loaded.port.model.apply(
        {"params": loaded.params},
        jnp.asarray(tokens),
        mask=Causal() & KeyPadding(jnp.asarray(valid)),
        positions=jnp.asarray(positions),
    )
    padded = theirs(
        model,
        tokens,
        attention_mask=torch.tensor(valid.astype(int)),
        position_ids=torch.tensor(positions),
    )
    np.testing.assert_allclose(
        np.asarray(ours)[valid], padded[valid], atol=1e-4, err_msg="visible positions"
    )


def test_cached_decoding_is_exact(folder, request, tokens):
    """Token by token, with a cache: the logits of the whole sequence, and their continuation."""
    if "dynamic" in request.node.name:
        tokens = tokens[:, :20]  # beyond its length its frequencies depend on what was read
    loaded = read(folder[1])
    task = loaded.port.make_task()
    whole = loaded.port.model.apply({"params": loaded.params}, jnp.asarray(tokens))
    state = task.start(loaded.params, {}, batch_size=2, length=tokens.shape[1])
    advance = jax.jit(task.advance)
    for i in range(tokens.shape[1]):
        logits, state = advance(loaded.params, {}, state, jnp.asarray(tokens[:, i : i + 1]))
        np.testing.assert_allclose(logits, whole[:, i], atol=1e-4)


def test_greedy_continuation_of_prompts_of_two_lengths(folder, request, tokens):
    model, path = folder
    loaded = read(path)
    prompts = [tokens[0, :7].tolist(), tokens[1, :12].tolist()]
    ours = generate(
        loaded.port.make_task(),
        loaded.params,
        {},
        prompts,
        length=8,
        temperature=0.0,
        key=jax.random.key(0),
    )
    for prompt, found in zip(prompts, ours, strict=True):
        given = torch.tensor([prompt])
        with torch.no_grad():
            longer = model.generate(
                given, max_new_tokens=8, do_sample=False, eos_token_id=-1, pad_token_id=0
            )
        assert found == longer[0, len(prompt) :].tolist()


def test_round_trip_is_bitwise(folder, tokens, tmp_path):
    model, path = folder
    loaded = read(path)
    huggingface.save(tmp_path / "out", loaded.config, loaded.params)
    assert_same_folder(path, tmp_path / "out")
    again = type(model).from_pretrained(tmp_path / "out").eval()
    np.testing.assert_array_equal(theirs(again, tokens), theirs(model, tokens))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_kept(tmp_path_factory, tmp_path, dtype):
    _, path = random_model(
        transformers.AutoModelForCausalLM, llama(), tmp_path_factory, getattr(torch, dtype)
    )
    loaded = read(path)
    assert {str(x.dtype) for x in jax.tree.leaves(loaded.params)} == {dtype}
    huggingface.save(tmp_path / "out", loaded.config, loaded.params)
    assert_same_folder(path, tmp_path / "out")


def test_shards(tmp_path_factory, tmp_path):
    """A folder in several files, read straight onto a mesh that divides the parameters."""
    from jaxformer.parallel.mesh import make_mesh

    _, path = random_model(
        transformers.AutoModelForCausalLM, llama(), tmp_path_factory, shard="20KB"
    )
    assert len(list(path.glob("*.safetensors"))) > 2
    mesh = make_mesh({"data": 2, "fsdp": 4})
    loaded = huggingface.load(path, mesh=mesh)
    kernel = loaded.params["stack"]["block_0"]["mlp"]["up"]["kernel"]
    assert kernel.sharding.spec == jax.sharding.PartitionSpec("fsdp", "tensor")
    huggingface.save(tmp_path / "out", loaded.config, loaded.params)
    assert_same_folder(path, tmp_path / "out")
