"""QSD-Transformer: integer spikes, few-bit weights, distilled attention (2501.13492)."""

from jaxformer.papers.qsd_transformer.experiments import CLAIMS as CLAIMS
from jaxformer.papers.qsd_transformer.recipe import build as build
