"""Zero-TPrune: tokens dropped by the attention graph of a trained ViT, untrained (2305.17328)."""

from jaxformer.papers.zero_tprune.compressor import compressor as compressor
from jaxformer.papers.zero_tprune.experiments import CLAIMS as CLAIMS
from jaxformer.papers.zero_tprune.recipe import build as build
