"""Hugging Face folders (`config.json`, `*.safetensors`, a tokenizer) as jaxformer models, and back.

`load` builds the model that a folder describes and reads its weights; `save` writes a folder that
`transformers` loads. Nothing of a folder is ever executed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jax.sharding import Mesh

from jaxformer.errors import ConfigError
from jaxformer.interop.huggingface import decoders, encoders, t5, vision
from jaxformer.interop.huggingface.page import Page, UnsupportedArchitecture
from jaxformer.interop.huggingface.port import Port
from jaxformer.interop.tensors import new_folder, open_tensors, read_json, save_tensors
from jaxformer.parallel.sharding import PARAMETER_RULES, place
from jaxformer.recipe import Params

__all__ = ["CONFIG", "Loaded", "UnsupportedArchitecture", "is_folder", "load", "port_of", "save"]

CONFIG = "config.json"
TOKENIZERS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "preprocessor_config.json",
    "generation_config.json",
)


def _text(name: str) -> tuple[str, ...]:
    """The architectures of an encoder of text."""
    heads = ("MaskedLM", "SequenceClassification", "QuestionAnswering")
    return tuple(f"{name}For{head}" for head in heads)


MODELS = {
    "gpt2": (decoders.gpt2, ("GPT2LMHeadModel",)),
    "llama": (decoders.llama, ("LlamaForCausalLM",)),
    "mistral": (decoders.llama, ("MistralForCausalLM",)),
    "qwen2": (decoders.llama, ("Qwen2ForCausalLM",)),
    "bert": (encoders.bert, _text("Bert")),
    "roberta": (encoders.bert, _text("Roberta")),
    "distilbert": (encoders.distilbert, _text("DistilBert")),
    "vit": (vision.vit, ("ViTForImageClassification",)),
    "deit": (
        vision.vit,
        ("DeiTForImageClassification", "DeiTForImageClassificationWithTeacher"),
    ),
    "swin": (vision.swin, ("SwinForImageClassification",)),
    "t5": (t5.t5, ("T5ForConditionalGeneration",)),
}


class Loaded(NamedTuple):
    """A folder, read."""

    config: dict[str, Any]
    port: Port
    params: Params


def port_of(config: Mapping[str, Any], source: str = CONFIG, dtype: str = "float32") -> Port:
    """The model that the fields of a `config.json` describe, its residual stream in `dtype`.

    Raises:
        UnsupportedArchitecture: a model, or an option of one, that jaxformer does not build.
        ConfigError: a field is missing or mistyped.
    """
    page = Page(config, source)
    page.require("model_type", *MODELS)
    build, heads = MODELS[page.text("model_type")]
    if page.architecture not in heads:
        raise page.unsupported("architectures", heads)
    return build(page, dtype)


def is_folder(path: str | Path) -> bool:
    """Whether this is a folder as the Hugging Face libraries write them."""
    return (Path(path) / CONFIG).is_file()


def load(
    folder: str | Path, *, mesh: Mesh | None = None, dtype: Any = None, compute: str = "float32"
) -> Loaded:
    """Read a folder: its config, the model, and the weights, each straight to its place on `mesh`.

    Weights keep the type of the file unless `dtype` names another; `compute` is that of the
    residual stream. The host holds one tensor at a time.

    Raises:
        ConfigError: the folder is not one, is damaged, or holds what jaxformer does not build.
    """
    folder = Path(folder).expanduser()
    if not is_folder(folder):
        raise ConfigError(f"{folder}: has no {CONFIG}; give a folder saved by `save_pretrained`")
    config = read_json(folder / CONFIG)
    port = port_of(config, str(folder / CONFIG), compute)
    abstract = port.abstract()
    if mesh is not None:
        abstract = place(abstract, mesh, PARAMETER_RULES)
    return Loaded(config, port, port.layout.read(open_tensors(folder), abstract, dtype))


def save(
    folder: str | Path,
    config: Mapping[str, Any],
    params: Params,
    *,
    files: str | Path | None = None,
    card: str | None = None,
) -> None:
    """Write a new folder that `transformers` loads; all of it, or nothing.

    `files` is a folder whose tokenizer is copied, `card` the text of its README.
    """
    port = port_of(config)
    with new_folder(folder) as new:
        save_tensors(new, port.layout.write(params))
        (new / CONFIG).write_text(json.dumps(dict(config), indent=2) + "\n")
        if files is not None:
            copy_tokenizer(files, new)
        if card is not None:
            (new / "README.md").write_text(card)


def copy_tokenizer(source: str | Path, target: Path) -> None:
    """Copy what belongs to a folder beside its weights."""
    for name in TOKENIZERS:
        if (Path(source) / name).is_file():
            shutil.copyfile(Path(source) / name, target / name)
