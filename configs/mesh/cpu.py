"""One CPU, or what it simulates: data-parallel."""

TOPOLOGY = None
MESH = {"data": -1}
