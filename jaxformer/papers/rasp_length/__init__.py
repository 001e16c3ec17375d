"""RASP-L: what algorithms transformers learn, by length generalisation (ICLR 2024, 2310.16028)."""

from jaxformer.papers.rasp_length.experiments import CLAIMS as CLAIMS
from jaxformer.papers.rasp_length.recipe import build as build
