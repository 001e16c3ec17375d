"""BiViT: binary vision transformers, softmax-aware, attention before MLP (2211.07091)."""

from jaxformer.papers.bivit.experiments import CLAIMS as CLAIMS
from jaxformer.papers.bivit.recipe import build as build
