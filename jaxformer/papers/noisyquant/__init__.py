"""NoisyQuant: quantising ViTs after training, with a noise that biases take back (2211.16056)."""

from jaxformer.papers.noisyquant.experiments import CLAIMS as CLAIMS
from jaxformer.papers.noisyquant.recipe import build as build
from jaxformer.papers.noisyquant.recipe import compressor as compressor
