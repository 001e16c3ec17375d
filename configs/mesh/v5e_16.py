"""16 v5e chips: parameters and optimiser state divided over all."""

TOPOLOGY = "v5e:4x4"
MESH = {"data": 1, "fsdp": 16}
