"""The authors' parameter names, those of Flax paths, as ours."""

from __future__ import annotations

from jaxformer.interop.authors import QKV, Tree, Weights, block


def attention(weights: Weights, prefix: str = "") -> Tree:
    """`_SelfAttSqrtn`, `_SelfAttLogn`, `_SelfAttAxialRowmajor`, `_AxialMixtureAtt`."""

    def kernel(name: str) -> Tree:
        return {"kernel": weights[f"{prefix}{name}/kernel"]}

    found = {name: kernel(name) for name in QKV}
    if f"{prefix}DenseGeneral_1/kernel" not in weights:
        return {**found, "out": kernel("DenseGeneral_0")}
    summary = {
        "out": kernel("DenseGeneral_0"),
        "norm": norm(weights, f"{prefix}LayerNorm_0"),
        "key": kernel("DenseGeneral_1"),
    }
    return {**found, "pattern": {"summary": summary}, "out": kernel("DenseGeneral_2")}


def norm(weights: Weights, name: str) -> Tree:
    """A LayerNorm of Flax."""
    return {part: weights[f"{name}/{part}"] for part in ("scale", "bias")}


def dense(weights: Weights, name: str) -> Tree:
    """A Dense of Flax."""
    return {part: weights[f"{name}/{part}"] for part in ("kernel", "bias")}


def layer(weights: Weights) -> Tree:
    """`SelfAttSqrtnLayer` as a `Block`."""
    return block(
        attention(weights, "_SelfAttSqrtn_0/"),
        norm(weights, "LayerNorm_0"),
        dense(weights, "MlpBlock_0/Dense_0"),
        dense(weights, "MlpBlock_0/Dense_1"),
        norm(weights, "LayerNorm_1"),
    )
