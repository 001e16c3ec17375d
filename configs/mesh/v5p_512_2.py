"""Two slices of 512 v5p chips: divided over 64; eight copies in each, summed over both."""

TOPOLOGY = "2*v5p:8x8x8"
MESH = {"data": 16, "fsdp": 64}
