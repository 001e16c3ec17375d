"""Flowformer: linear attention as a flow network with conserved flows (ICML 2022, 2202.06258)."""

from jaxformer.papers.flowformer.experiments import CLAIMS as CLAIMS
from jaxformer.papers.flowformer.model import variant as variant
from jaxformer.papers.flowformer.recipe import build as build
