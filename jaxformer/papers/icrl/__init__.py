"""Transformers as decision makers: in-context RL by imitation (ICLR 2024, 2310.08566)."""

from jaxformer.papers.icrl.experiments import CLAIMS as CLAIMS
from jaxformer.papers.icrl.recipe import build as build
