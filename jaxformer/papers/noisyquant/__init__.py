"""NoisyQuant: quantising ViTs after training, with a noise that the bias takes back (2211.16056)."""

from jaxformer.papers.noisyquant.experiments import CLAIMS as CLAIMS
from jaxformer.papers.noisyquant.recipe import build as build
