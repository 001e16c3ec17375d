"""Kernels that are interpreted or simulated here are slow: the quick tests leave them out."""

import pathlib

import pytest

INTERPRETED = ("mosaic_tpu", "triton", "mosaic_gpu")


def pytest_collection_modifyitems(items):
    for item in items:
        if pathlib.Path(__file__).parent in item.path.parents:
            call = getattr(item, "callspec", None)
            if "simulator" in item.fixturenames or (
                call is not None and call.params.get("impl") in INTERPRETED
            ):
                item.add_marker(pytest.mark.slow)
