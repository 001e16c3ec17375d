"""AdaLog: post-training quantisation with an adaptive logarithm (arXiv 2407.12951)."""

from jaxformer.papers.adalog.experiments import CLAIMS as CLAIMS
from jaxformer.papers.adalog.recipe import build as build
