"""Our values for the golden cases of `combiner`."""

from __future__ import annotations

from jaxformer.analyze.implied import implied_weights
from jaxformer.kernels.attention import Causal
from jaxformer.nn.activation import RELU
from jaxformer.nn.block import Block, PreNorm
from jaxformer.nn.make import Make
from jaxformer.nn.mlp import MLP
from jaxformer.nn.norm import LayerNorm
from jaxformer.papers.combiner import authors
from jaxformer.papers.combiner.model import (
    EPSILON,
    Axial,
    CombinerAttention,
    Fixed,
    Logsparse,
    Mixture,
)

PATTERNS = {
    "_SelfAttSqrtn": Fixed,
    "SelfAttSqrtnLayer": Fixed,
    "_SelfAttLogn": Logsparse,
    "_SelfAttAxialRowmajor": Axial,
    "_AxialMixtureAtt": Mixture,
}


def mixer(config):
    cls = PATTERNS[config["module"].rpartition("::")[2]]
    segment = {} if cls is Logsparse else {"segment": config["max_seg_len"]}
    head_size = config["qkv_dim"] // config["num_heads"]
    pattern = Make(cls, **segment)
    return Make(CombinerAttention, heads=config["num_heads"], head_size=head_size, pattern=pattern)


def attention_case(case):
    layer = mixer(case.config)()

    def main(weights, inputs):
        params = authors.attention(weights)
        return layer.apply({"params": params}, inputs["x"], mask=Causal())

    params = {"params": authors.attention(case.weights)}
    x = case.inputs["x"]
    return {
        **case.outputs_and_gradients(main),
        "out/effective_matrix": implied_weights(layer, params, x, mask=Causal(), keep=["summary"]),
    }


def layer_case(case):
    block = Block(
        mixer=mixer(case.config),
        mlp=Make(MLP, hidden=case.config["mlp_dim"], activation=RELU),
        residual=Make(PreNorm, norm=Make(LayerNorm, epsilon=EPSILON)),
    )

    def main(weights, inputs):
        return block.apply({"params": authors.layer(weights)}, inputs["x"], mask=Causal())

    return case.outputs_and_gradients(main)


PORTS = {
    "fixed": attention_case,
    "logsparse": attention_case,
    "axial": attention_case,
    "mixture": attention_case,
    "fixed_layer": layer_case,
}
