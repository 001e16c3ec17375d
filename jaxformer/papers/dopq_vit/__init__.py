"""DopQ-ViT: post-training quantisation for the distributions of ViTs (arXiv 2408.03291)."""

from jaxformer.papers.dopq_vit.experiments import CLAIMS as CLAIMS
from jaxformer.papers.dopq_vit.recipe import build as build
