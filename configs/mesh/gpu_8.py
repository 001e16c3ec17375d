"""One host of eight GPUs: parameters and optimiser state divided over all."""

TOPOLOGY = "h200:1x8"
MESH = {"data": 1, "fsdp": 8}
