"""512 v5p chips: divided over 64 of them, eight copies."""

TOPOLOGY = "v5p:8x8x8"
MESH = {"data": 8, "fsdp": 64}
