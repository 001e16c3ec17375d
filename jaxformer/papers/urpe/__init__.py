"""URPE: relative positions that are universal, by one matrix after softmax (2205.13401)."""

from jaxformer.papers.urpe.experiments import CLAIMS as CLAIMS
from jaxformer.papers.urpe.model import variant as variant
from jaxformer.papers.urpe.recipe import build as build
