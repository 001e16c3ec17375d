"""Do pretrained transformers learn in context by gradient descent? They do not (2310.08540)."""

from jaxformer.papers.icl_vs_gd.experiments import CLAIMS as CLAIMS
from jaxformer.papers.icl_vs_gd.recipe import build as build
