"""DSFormer: weights as sparse times small dense matrices, learned straight through (2312.13211)."""

from jaxformer.papers.dsformer.compressor import compressor as compressor
from jaxformer.papers.dsformer.experiments import CLAIMS as CLAIMS
from jaxformer.papers.dsformer.recipe import build as build
