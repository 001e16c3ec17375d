"""The README's example is a user's whole program: it runs as it stands, only shorter."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np

import jaxformer

ROOT = Path(__file__).parent.parent
EXAMPLE = re.search(
    r"<!-- example -->\n```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL
)[1]


def test_the_example_is_short_and_learns(one_device, tmp_path):
    assert len(EXAMPLE.splitlines()) < 60
    names = {"__name__": "example"}
    exec(compile(EXAMPLE, "README.md", "exec"), names)
    recipe = names["recipe"](steps=30, length=32, batch_size=8)
    options = jaxformer.FitOptions(progress=False, log_every=5)
    jaxformer.fit(recipe, workdir=tmp_path, mesh=one_device, options=options)
    from jaxformer.observe.metrics import read_jsonl

    losses = [row["loss"] for row in read_jsonl(tmp_path / "metrics.jsonl") if "loss" in row]
    assert losses[-1] < losses[0] - 0.5
    (found,) = jaxformer.evaluate(tmp_path, recipe=recipe, mesh=one_device)
    assert 0 < found["eval/loss"] < np.log(257)


def test_the_commands_exist():
    """Every verb and flag that the README shows is one."""
    text = (ROOT / "README.md").read_text()
    verbs = set(re.findall(r"^\./launch/local (\w+)", text, re.MULTILINE))
    expected = {"train", "test", "list", "reproduce", "show", "evaluate", "sample", "bench"}
    expected |= {
        "plan",
        "multihost",
        "import",
        "export",
        "convert",
        "launch",
        "soak",
        "compare",
        "compress",
    }
    assert expected == verbs
    for verb in verbs - {"test"}:
        shown = subprocess.run(
            [sys.executable, "-m", "jaxformer", verb, "--help"], capture_output=True, text=True
        )
        assert shown.returncode == 0
        for line in re.findall(rf"^\./launch/local {verb} (.*?)(?:#|$)", text, re.MULTILINE):
            for flag in re.findall(r"--[a-z-]+(?=[ =]|$)", line):
                assert flag in shown.stdout or flag.startswith("--config"), (verb, flag)
