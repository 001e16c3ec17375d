"""DopQ-ViT: quantising ViTs after training, attention by a tangent (2408.03291)."""

from jaxformer.papers.dopq_vit.experiments import CLAIMS as CLAIMS
from jaxformer.papers.dopq_vit.recipe import build as build
from jaxformer.papers.dopq_vit.recipe import compressor as compressor
