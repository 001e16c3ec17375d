"""PFN: transformers can do Bayesian inference (ICLR 2022, 2112.10510)."""

from jaxformer.papers.pfn.experiments import CLAIMS as CLAIMS
from jaxformer.papers.pfn.recipe import build as build
