"""Key-driven GQA: the norms of keys say how many queries a key head serves (2408.08454)."""

from jaxformer.papers.key_driven_gqa.experiments import CLAIMS as CLAIMS
from jaxformer.papers.key_driven_gqa.model import variant as variant
from jaxformer.papers.key_driven_gqa.recipe import build as build
