"""1024 v5p chips: divided over 64 of them, 16 copies.

Divided over all of them, 8 rows of a 70B decoder's weights are left per chip, and the TPU compiler
turns every gather into an all-reduce: 790 GiB sent per chip and step.
"""

TOPOLOGY = "v5p:8x8x16"
MESH = {"data": 16, "fsdp": 64}
