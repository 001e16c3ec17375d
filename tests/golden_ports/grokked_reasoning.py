"""Our values for the golden cases of `grokked_reasoning`."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jaxformer.analyze import patching
from jaxformer.analyze.capture import BLOCKS, Edit, capture
from jaxformer.kernels.attention import Causal, KeyPadding
from jaxformer.models.transformer import Transformer
from jaxformer.nn.attention import Fused, Unfused
from jaxformer.nn.make import swap
from jaxformer.papers.grokked_reasoning import authors, facts
from jaxformer.papers.grokked_reasoning.model import language_model
from jaxformer.tasks.losses import cross_entropy


def gpt2(case):
    c = case.config
    heads, layers = c["n_head"], c["n_layer"]
    trunk = Transformer(
        width=c["n_embd"],
        depth=layers,
        heads=heads,
        mlp="gelu_tanh",
        repeat=2 if c.get("add_recurrence") else 1,
    )
    model = language_model(trunk, c["vocab_size"], c["n_positions"])
    mask = Causal() & KeyPadding(case.inputs["attention_mask"] == 1)

    def main(weights, inputs):
        params = authors.language_model(weights, heads, layers)
        return model.apply({"params": params}, inputs["input_ids"], mask=mask)

    found = case.outputs_and_gradients(main)
    labels = case.inputs["labels"][:, 1:]
    each = cross_entropy(found["out/main"][:, :-1], jnp.maximum(labels, 0))
    found["out/loss"] = jnp.where(labels >= 0, each, 0).sum() / (labels >= 0).sum()

    opened = swap(model, Fused, Unfused)
    variables = {"params": authors.language_model(case.weights, heads, layers)}
    ids = case.inputs["input_ids"]
    states = patching.states(opened, variables, ids, mask=mask)
    norm = model.norm(parent=None)
    last = norm.apply({"params": variables["params"]["norm"]}, states[-1])
    for i, state in enumerate([*states[:-1], last]):
        found[f"out/hidden_states_{i}"] = state
    seen = capture(opened, variables, ids, sites=[patching.WEIGHTS], mask=mask).values[0]
    turns = max(len(calls) for calls in seen.values())
    for turn in range(turns):
        for i in range(layers):
            calls = seen[f"stack/block_{i}/mixer/core/mix"]
            found[f"out/attention_{turn * layers + i}"] = calls[turn]

    if "out/logits_re_embed" in case.arrays:
        table = variables["params"]["embed"]["table"]

        def embed_again(h):
            return h + jax.nn.softmax(c["re_embed_temp"] * h @ table.T) @ table

        between = dataclasses.replace(BLOCKS, pattern="block_0$", call=1)
        edits = [Edit(between, embed_again)]
        found["out/logits_re_embed"] = capture(model, variables, ids, edits=edits, mask=mask).output
    return found


def data(case):
    """The splits that follow from the file's facts and flags; coins are read off its tables."""
    given = {name: np.asarray(x) for name, x in case.inputs.items()}
    base, is_ood = given["atomics"], given["is_ood"] == 1
    two_hop = facts.follow(base, is_ood)
    tables = facts.named(base, is_ood, two_hop, _among(two_hop["id"], case, "test_inferred_iid"))

    values = given["comparison_kb"]
    ood = np.zeros(values.shape, bool)
    rows = case.arrays["out/comparison_ood_atomic"]
    ood[rows[:, 0], rows[:, 1]] = True
    coins = np.zeros((values.shape[1], len(values), len(values)), bool)
    rows = case.arrays["out/comparison_test_inferred_iid"]
    coins[rows[:, 0], rows[:, 1], rows[:, 2]] = True
    compared = facts.compare(values, ood, np.triu(coins))
    compared = {f"comparison_{name}": table for name, table in compared.items()}
    found = {
        f"out/{name}": table[np.lexsort(table.T[::-1])]
        for name, table in (tables | compared).items()
        if not name.endswith("mixed")
    }
    return found | {"out/main": found["out/train_inferred"]}


def _among(rows, case, name):
    chosen = {tuple(row) for row in case.arrays[f"out/{name}"].tolist()}
    return np.array([tuple(row) in chosen for row in rows.tolist()], bool)


PORTS = {"gpt2": gpt2, "recurrence": gpt2, "data": data}
