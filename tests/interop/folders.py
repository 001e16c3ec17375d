"""Hugging Face folders with small random models, for the parity tests."""

import numpy as np

from jaxformer.interop import huggingface
from jaxformer.interop.tensors import open_tensors


def random_model(cls, config, factory, dtype=None, shard="5GB"):
    """A model in which every parameter, gains and biases too, is random; and its folder."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    generator = torch.Generator().manual_seed(0)
    model = (cls.from_config(config) if hasattr(cls, "from_config") else cls(config)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.2 * noise if parameter.ndim > 1 else parameter + 0.1 * noise)
    model = model if dtype is None else model.to(dtype)
    path = factory.mktemp("folder")
    model.save_pretrained(path, max_shard_size=shard)
    return model, path


def read(path):
    return huggingface.load(path)


def assert_same_folder(one, other):
    """The same tensors under the same names, to the last bit, in the same types."""
    first, second = open_tensors(one), open_tensors(other)
    assert set(first.names) == set(second.names)
    for name in first.names:
        a, b = first.read(name), second.read(name)
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a.view(np.uint8), b.view(np.uint8), err_msg=name)
