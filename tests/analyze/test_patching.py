"""Capturing and changing what passes the modules of plain models."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.analyze import patching
from jaxformer.analyze.capture import BLOCKS, Edit, Site, capture, only, passed
from jaxformer.errors import ConfigError
from jaxformer.kernels.attention import Full
from jaxformer.models.lm import decoder_lm
from jaxformer.models.transformer import Transformer
from jaxformer.nn.attention import Fused, Mix, Unfused
from jaxformer.nn.block import unstack_layers
from jaxformer.nn.einsum import Einsum
from jaxformer.nn.make import swap

L, V, DEPTH = 5, 7, 2
TRUNK = Transformer(width=16, depth=DEPTH, heads=2)


def model_of(trunk):
    return swap(decoder_lm(trunk, vocabulary=V, length=L), Fused, Unfused)


@pytest.fixture(scope="module")
def lm():
    """A model with weights of size 1 and two batches that differ at position 2."""
    model = model_of(TRUNK)
    tokens = jax.random.randint(jax.random.key(0), (4, L), 0, V)
    params = model.init(jax.random.key(1), tokens)["params"]
    params = jax.tree.map(lambda x: x + 0.3 * jax.random.normal(jax.random.key(2), x.shape), params)
    return model, {"params": params}, tokens, tokens.at[:, 2].set((tokens[:, 2] + 1) % V)


def test_values_are_those_of_the_modules(lm):
    model, variables, tokens, _ = lm
    sites = (Site(kind=Mix, argument=0), Site(r"mlp/up$", Einsum, 1, "contract"), BLOCKS)
    run = jax.jit(lambda t: capture(model, variables, t, sites=sites))(tokens)
    np.testing.assert_allclose(run.output, model.apply(variables, tokens), atol=1e-5)
    weights, kernels, stream = run.values
    assert len(weights) == len(kernels) == len(stream) == DEPTH
    for (p,) in weights.values():
        np.testing.assert_allclose(p.sum(-1), 1, atol=1e-5)
        assert p.shape == (4, 2, L, L) and not np.triu(p, 1).any()
    (kernel,) = kernels["stack/block_1/mlp/up"]
    np.testing.assert_array_equal(
        kernel, variables["params"]["stack"]["block_1"]["mlp"]["up"]["kernel"]
    )


def test_scanned_layers_lie_along_an_axis(lm):
    model, _, tokens, _ = lm
    scanned = model_of(dataclasses.replace(TRUNK, scan=True))
    params = scanned.init(jax.random.key(1), tokens)["params"]
    site = (Site(kind=Mix, argument=0),)
    p = only(capture(scanned, {"params": params}, tokens, sites=site).values[0])
    assert p.shape[0] == DEPTH
    unrolled = capture(model, {"params": unstack_layers(params)}, tokens, sites=site)
    for i, (own,) in enumerate(unrolled.values[0].values()):
        np.testing.assert_allclose(p[i], own, atol=1e-5)


def test_the_lens_ends_at_the_output(lm):
    model, variables, tokens, _ = lm
    lens = jax.jit(lambda t: patching.logit_lens(model, variables, t))(tokens)
    assert lens.shape == (DEPTH + 1, 4, L, V)
    np.testing.assert_allclose(lens[-1], model.apply(variables, tokens), atol=1e-5)
    params = variables["params"]
    first = params["embed"]["table"][tokens] + params["position"]["table"]
    normed = model.norm().apply({"params": params["norm"]}, first)
    np.testing.assert_allclose(lens[0], normed @ params["embed"]["table"].T, atol=1e-4)


def test_states_in_their_own_place_change_nothing(lm):
    model, variables, tokens, _ = lm
    run = jax.jit(
        lambda t: patching.causal_trace(
            model, variables, t, t, positions=[[p] for p in range(L)], measure=lambda y: y
        )
    )
    plain = jax.jit(
        lambda t: (
            patching.run_from(
                model, variables, t, layer=0, state=patching.states(model, variables, t)[0]
            ).output
        )
    )(tokens)
    for row in run(tokens).reshape(-1, *plain.shape):
        np.testing.assert_allclose(row, plain, atol=2e-6)
    states = patching.states(model, variables, tokens)
    for layer, state in enumerate(states[:-1]):
        again = patching.run_from(model, variables, tokens, layer=layer, state=state).output
        np.testing.assert_array_equal(again, model.apply(variables, tokens))


def test_the_first_layer_reads_the_token(lm):
    model, variables, tokens, other = lm
    trace = patching.causal_trace(
        model, variables, tokens, other, positions=[[2], [1], [1, 2]], measure=lambda y: y
    )
    assert trace.shape == (DEPTH, 3, 4, L, V)
    np.testing.assert_allclose(trace[0, 0], model.apply(variables, other), atol=1e-5)
    np.testing.assert_allclose(trace[0, 1], model.apply(variables, tokens), atol=1e-5)
    np.testing.assert_allclose(trace[:, 0], trace[:, 2], atol=1e-5)
    # Positions before the one patched do not see it; from the last layer on, others neither.
    plain = model.apply(variables, tokens)
    np.testing.assert_allclose(trace[:, 0, :, :2], plain[None, :, :2].repeat(DEPTH, 0), atol=1e-5)
    assert np.abs(trace[-1, 0, :, 2] - plain[:, 2]).max() > 1e-2


def test_edges_are_cut_one_at_a_time(lm):
    model, variables, tokens, _ = lm
    one = tokens[:1]

    def effects(layer, to):
        return jax.jit(
            lambda t: patching.edge_effects(
                model, variables, t, layer=layer, to=to, measure=lambda run: run.output[0, -1]
            )
        )(one).reshape(2, L, L, V)

    plain = model.apply(variables, one)[0, -1]
    for to in patching.EDGES:
        last = effects(DEPTH - 1, to)
        np.testing.assert_allclose(
            last[:, :-1], jnp.broadcast_to(plain, (2, L - 1, L, V)), atol=1e-5
        )
        assert np.abs(last[:, -1] - plain).max() > 1e-3
    # An edge by hand: the largest weight that key 1 has in head 1 of layer 1, for query 4.
    site = Site(r"block_1/", Mix, 0)
    edit = Edit(site, lambda p: p.at[0, 1, 4, 1].set(p[0, 1, :, 1].max()))
    by_hand = capture(model, variables, one, edits=[edit]).output[0, -1]
    np.testing.assert_allclose(effects(1, "max")[1, 4, 1], by_hand, atol=1e-5)
    masked = effects(0, "zero")[:, 0, 1:]  # a weight that is 0 already
    np.testing.assert_allclose(masked, jnp.broadcast_to(plain, masked.shape), atol=1e-5)


def test_attention_can_be_held(lm):
    """With all attention as it was for other tokens, the output is another one than either's."""
    model, variables, tokens, other = lm
    weights = capture(model, variables, other, sites=[patching.WEIGHTS]).values[0]
    edits = patching.held(patching.WEIGHTS, weights)
    same = capture(model, variables, other, edits=edits).output
    np.testing.assert_array_equal(same, model.apply(variables, other))
    run = capture(model, variables, tokens, sites=[patching.WEIGHTS], edits=edits)
    for path, (p,) in run.values[0].items():
        np.testing.assert_array_equal(p, weights[path][0])
    assert np.abs(run.output - same).max() > 1e-3


def test_ranks():
    logits = jnp.array([[0.1, 3.0, 2.0], [1.0, 1.0, 0.0]])
    np.testing.assert_array_equal(patching.rank(logits, jnp.array([2, 1])), [1, 0])


@pytest.mark.parametrize("scan", [False, True])
def test_looped_layers_share_their_weights(scan):
    """`repeat=2` is an unrolled stack of twice the depth with copied weights, to the gradient."""
    trunk = dataclasses.replace(TRUNK, scan=scan)
    looped = model_of(dataclasses.replace(trunk, repeat=2))
    unrolled = model_of(dataclasses.replace(TRUNK, depth=2 * DEPTH))
    tokens = jnp.arange(2 * L).reshape(2, L) % V
    params = looped.init(jax.random.key(0), tokens)["params"]

    def twice(params):
        stack = unstack_layers(params)["stack"]
        copies = {f"block_{i}": stack[f"block_{i % DEPTH}"] for i in range(2 * DEPTH)}
        return {**params, "stack": copies}

    def loss(params, model):
        return jnp.sin(model.apply({"params": params}, tokens)).sum()

    plain = unrolled.apply({"params": twice(params)}, tokens)
    np.testing.assert_allclose(looped.apply({"params": params}, tokens), plain, atol=1e-6)
    a = jax.grad(loss)(params, looped)
    b = jax.grad(lambda p: loss(twice(p), unrolled))(params)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-5), a, b)
    if not scan:
        layers = passed(looped, {"params": params}, tokens, site=BLOCKS)
        assert [layer.call for layer in layers] == [0] * DEPTH + [1] * DEPTH
        assert len(patching.logit_lens(looped, {"params": params}, tokens)) == 2 * DEPTH + 1


def test_mistakes_are_named(lm):
    model, variables, tokens, other = lm
    fused = swap(model, Unfused, Fused)
    scanned = model_of(dataclasses.replace(TRUNK, scan=True))
    scanned_variables = jax.eval_shape(scanned.init, jax.random.key(0), tokens)

    def trace(**how):
        how = {"positions": [[0]], "measure": lambda y: y, **how}
        patching.causal_trace(model, variables, tokens, other, **how)

    for act, said in (
        (lambda: capture(fused, variables, tokens, sites=[patching.WEIGHTS]), "swap"),
        (lambda: patching.states(scanned, scanned_variables, tokens), "model.scan=False"),
        (lambda: trace(layers=[DEPTH]), "layer=2: the model has layers 0 to 1"),
        (lambda: trace(layers=[-1]), "layer=-1"),
        (lambda: trace(positions=[[L]]), "positions: 5 is not one of 0 to 4"),
        (
            lambda: patching.edge_effects(
                model, variables, tokens, layer=0, to="zero", measure=lambda r: r.output
            ),
            "a batch of 4",
        ),
        (
            lambda: patching.edge_effects(
                model, variables, tokens[:1], layer=0, to="one", measure=lambda r: r.output
            ),
            "to='one'",
        ),
        (lambda: decode(), "cannot decode"),
    ):
        with pytest.raises(ConfigError, match=said):
            act()


def decode():
    looped = model_of(dataclasses.replace(TRUNK, repeat=2))
    jax.eval_shape(lambda: looped.init(jax.random.key(0), jnp.zeros((1, L), int), decode=True))


def test_masks_are_passed_on(lm):
    model, variables, tokens, _ = lm
    lens = patching.logit_lens(model, variables, tokens, mask=Full())
    np.testing.assert_allclose(lens[-1], model.apply(variables, tokens, mask=Full()), atol=1e-5)
