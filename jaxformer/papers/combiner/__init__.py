"""Combiner: full attention at sparse cost, by structured factors (NeurIPS 2021, 2107.05768)."""

from jaxformer.papers.combiner.experiments import CLAIMS as CLAIMS
from jaxformer.papers.combiner.model import variant as variant
from jaxformer.papers.combiner.recipe import build as build
