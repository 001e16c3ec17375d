"""LEDiT: a diffusion transformer without positions that draws beyond its size (2503.04344)."""

from jaxformer.papers.ledit.experiments import CLAIMS as CLAIMS
from jaxformer.papers.ledit.recipe import build as build
