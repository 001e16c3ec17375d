"""SSA: attention to keys drawn anew at every step, and the ensemble it trains (2306.01705)."""

from jaxformer.papers.ssa.experiments import CLAIMS as CLAIMS
from jaxformer.papers.ssa.model import variant as variant
from jaxformer.papers.ssa.recipe import build as build
