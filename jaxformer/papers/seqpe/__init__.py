"""SeqPE: positions as digit strings that a small Transformer reads (2506.13277)."""

from jaxformer.papers.seqpe.experiments import CLAIMS as CLAIMS
from jaxformer.papers.seqpe.model import variant as variant
from jaxformer.papers.seqpe.recipe import build as build
