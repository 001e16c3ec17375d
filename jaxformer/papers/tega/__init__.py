"""TEGA: first-order queries over knowledge graphs, by a logic-aware encoder (2501.00759)."""

from jaxformer.papers.tega.experiments import CLAIMS as CLAIMS
from jaxformer.papers.tega.recipe import build as build
