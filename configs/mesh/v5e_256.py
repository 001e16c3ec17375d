"""A v5e pod: parameters and optimiser state divided over all."""

TOPOLOGY = "v5e:16x16"
MESH = {"data": 1, "fsdp": 256}
