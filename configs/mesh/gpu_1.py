"""One GPU."""

TOPOLOGY = "h200:1x1"
MESH = {"data": 1}
