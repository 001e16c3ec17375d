"""The house rules that a program can check."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "jaxformer").rglob("*.py"))


def run(*command):
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_formatted_and_linted():
    run(sys.executable, "-m", "ruff", "format", "--check", ".")
    run(sys.executable, "-m", "ruff", "check", ".")


@pytest.mark.slow
def test_types_of_the_core():
    run(sys.executable, "-m", "mypy")


def test_dependencies_run_one_way():
    run(str(Path(sys.executable).parent / "lint-imports"))


def test_the_core_is_small_and_free_of_linen():
    core = [ROOT / "jaxformer" / "recipe.py", *sorted((ROOT / "jaxformer" / "train").glob("*.py"))]
    core = [path for path in core if path.name != "bench.py"]
    lines = [line for path in core for line in path.read_text().splitlines() if line.strip()]
    assert len(lines) <= 1400
    for path in core:
        assert "flax" not in re.sub(r'"[^"]*"', "", path.read_text()), path


def test_modules_are_read_in_one_sitting():
    long = {str(p): n for p in SOURCES if (n := len(p.read_text().splitlines())) > 400}
    assert not long
    assert not [p for p in SOURCES if p.stem in ("utils", "helpers", "common")]


def test_meshes_are_made_in_one_place():
    """`jax.make_mesh` makes Explicit axes by default, on which Linen layers do not run."""
    for path in SOURCES:
        if path.name != "mesh.py":
            assert not re.search(r"jax\.make_mesh\(|[^.\w]Mesh\(", path.read_text()), path
