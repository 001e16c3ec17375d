"""Attention for Hopper GPUs (sm_90a) in Pallas Mosaic GPU: forward and backward."""

from jaxformer.kernels.attention.mosaic_gpu.op import mosaic_gpu, refuse

__all__ = ["mosaic_gpu", "refuse"]
