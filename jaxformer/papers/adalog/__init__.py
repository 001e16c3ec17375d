"""AdaLog: quantising ViTs after training, by logarithms whose base is searched (2407.12951)."""

from jaxformer.papers.adalog.experiments import CLAIMS as CLAIMS
from jaxformer.papers.adalog.recipe import build as build
from jaxformer.papers.adalog.recipe import compressor as compressor
