"""Attention for Hopper GPUs (sm_90a) in Pallas Mosaic GPU: forward and backward."""

from jaxformer.kernels.attention.mosaic_gpu.op import mosaic_gpu, refuse
from jaxformer.kernels.attention.mosaic_gpu.schedule import tiles

__all__ = ["mosaic_gpu", "refuse", "tiles"]
