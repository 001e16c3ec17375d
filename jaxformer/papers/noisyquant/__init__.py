"""NoisyQuant: a noisy bias that lowers rounding errors (arXiv 2211.16056)."""

from jaxformer.papers.noisyquant.experiments import CLAIMS as CLAIMS
from jaxformer.papers.noisyquant.recipe import build as build
