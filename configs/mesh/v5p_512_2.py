"""Two slices of 512 v5p chips: a copy on each, gradients summed over the network between."""

TOPOLOGY = "2*v5p:8x8x8"
MESH = {"data": 2, "fsdp": 512}
