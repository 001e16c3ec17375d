"""L2ViT: windows and linear attention in turn, made to focus by convolutions (2501.16182)."""

from jaxformer.papers.l2vit.experiments import CLAIMS as CLAIMS
from jaxformer.papers.l2vit.model import variant as variant
from jaxformer.papers.l2vit.recipe import build as build
