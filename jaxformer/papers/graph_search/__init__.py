"""Transformers struggle to learn to search: graphs, a searcher and its circuits (2412.04703)."""

from jaxformer.papers.graph_search.experiments import CLAIMS as CLAIMS
from jaxformer.papers.graph_search.recipe import build as build
