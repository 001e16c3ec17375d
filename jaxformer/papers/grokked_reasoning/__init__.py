"""Grokked Transformers are implicit reasoners: two-hop facts and comparisons (2405.15071)."""

from jaxformer.papers.grokked_reasoning.experiments import CLAIMS as CLAIMS
from jaxformer.papers.grokked_reasoning.recipe import build as build
