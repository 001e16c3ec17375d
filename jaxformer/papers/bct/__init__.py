"""BCT: a whole encoder in blocks of small integers, without retraining (2304.01483)."""

from jaxformer.papers.bct.experiments import CLAIMS as CLAIMS
from jaxformer.papers.bct.recipe import build as build
