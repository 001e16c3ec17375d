"""Attention for Hopper GPUs (sm_90a) in Pallas Mosaic GPU: forward and backward."""
