"""3DTRL: patches at places in space, for unseen viewpoints (NeurIPS 2022, 2206.11895)."""

from jaxformer.papers.tokens3d.experiments import CLAIMS as CLAIMS
from jaxformer.papers.tokens3d.recipe import build as build
