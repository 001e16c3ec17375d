"""The benchmark runs at the smallest size and fills its table; figures are not asserted."""

import math

from jaxformer.data.bench import bench_data


def test_bench_fills_a_row_per_loader():
    rows = bench_data(batch_size=2, length=16, image_size=32, seconds=0.01, depth=2)
    assert [row["loader"].split(",")[0] for row in rows] == [
        "text",
        "text",
        "digits",
        "JPEG folder at 32",
    ]
    for row in rows:
        assert all(math.isfinite(v) and v >= 0 for k, v in row.items() if k != "loader")
        assert (row["tokens/s"] > 0) == row["loader"].startswith("text")
