"""NViT: global structural pruning of ViTs, by a Hessian score and by latency (2110.04869)."""

from jaxformer.papers.nvit.compressor import compressor as compressor
from jaxformer.papers.nvit.experiments import CLAIMS as CLAIMS
from jaxformer.papers.nvit.recipe import build as build
