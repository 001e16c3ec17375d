"""The command line as a user types it: every mistake is one line and exit code 2."""

import json
import subprocess
import sys
import time

import pytest
from PIL import Image

from jaxformer.cli import main


def cli(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "jaxformer", *arguments], capture_output=True, text=True, timeout=120
    )


def test_list_and_mistakes_need_no_jax():
    program = (
        "import sys; from jaxformer.cli import main\n"
        "assert main(['list', '--json']) == 0\n"
        "assert main(['train', '--config.modle.width=3']) == 2\n"
        "assert main(['train', '--config', 'pfn:huge']) == 2\n"
        "assert 'jax' not in sys.modules, 'jax was imported'\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert {"flowformer", "linear_icl", "pfn"} <= {row["paper"] for row in rows}
    assert all(row["title"] and "small" in row["presets"] for row in rows)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["train", "--config.model.widht=3"], ["config.model.widht", "did you mean 'width'"]),
        (["train", "--config.model.width=many"], ["config.model.width", "needs an int"]),
        (["train", "--config.model=3"], ["config.model", "is a section"]),
        (["train", "--config", "flowformer:huge"], ["no preset 'huge'", "tiny, small"]),
        (["train", "--config", "flowfromer"], ["no file 'flowfromer'", "flowformer"]),
        (["train", "--widht", "3"], ["'--widht'", "--config.<field>=<value>"]),
        (["show", "nothing/there.py"], ["nothing/there.py"]),
        (["evaluate"], ["CHECKPOINT"]),
        (["evaluate", "/no/such/run"], ["/no/such/run", "training run"]),
        (["sample", "--workdir", "/no/such/run", "--length", "x"], ["--length", "invalid int"]),
        (["reproduce", "nobody"], ["nobody", "flowformer"]),
        (["trian"], ["trian", "train"]),
        (["train", "--config", "flowformer:tiny", "--config.mesh.data=7"], ["mesh", "devices"]),
        (
            ["train", "--config", "flowformer:tiny", "--config.data.text=/no/*.txt"],
            ["data.text", "/no/*.txt"],
        ),
        (["train", "--config", "flowformer:tiny", "--config.optim.name=adamm"], ["optim.name"]),
    ],
)
def test_mistakes_are_named_in_one_line(arguments, expected, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("jaxformer:")]
    assert len(lines) == 1 and "Traceback" not in captured.err
    for part in expected:
        assert part in lines[0], lines[0]


def test_markdown_list_is_the_table_of_the_readme(capsys):
    from jaxformer.config import PACKAGE

    assert main(["list", "--markdown"]) == 0
    assert capsys.readouterr().out.strip() in (PACKAGE.parent / "README.md").read_text()


@pytest.mark.slow
def test_train_evaluate_sample(tmp_path, capsys):
    """The whole way of a user, in this process, on the tiny preset."""
    run = str(tmp_path / "run")
    train = ["train", "--config", "flowformer:tiny", "--config.steps=16", "--workdir", run]
    assert main([*train, "--stop-after", "8", "--config.fit.checkpoint_every=4"]) == 75
    assert main([*train, "--config.fit.checkpoint_every=4"]) == 0
    report = (tmp_path / "run" / "report.md").read_text()
    assert "## Sample" in report and "curves.png" in report and "Evaluations" in report
    assert (tmp_path / "run" / "curves.png").stat().st_size > 5000
    capsys.readouterr()
    assert main(["evaluate", run, "--steps", "8:16"]) == 0
    rows = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert [row["step"] for row in rows] == [8, 12, 16]
    assert all(row["validation/loss"] > 0 for row in rows)
    assert main(["evaluate", run, "--steps", "13:15"]) == 2
    assert "saved: " in capsys.readouterr().err
    sample = ["sample", "--workdir", run, "--prompt", "def ", "--length", "12", "--temperature"]
    assert main([*sample, "0"]) == 0
    first = capsys.readouterr().out
    assert first.startswith("def ")
    assert main([*sample, "0", "--seed", "5"]) == 0
    assert capsys.readouterr().out == first
    assert main([*sample, "-1"]) == 2


@pytest.mark.slow
def test_train_and_draw_pictures(tmp_path, capsys):
    """A run that denoises: pictures in its report, and from `sample`, of any size."""
    run = tmp_path / "run"
    few = ["--config.steps=3", "--config.evaluate.frechet=4", "--config.sample.steps=2"]
    assert main(["train", "--config", "ledit:tiny", "--workdir", str(run), *few]) == 0
    report = (run / "report.md").read_text()
    assert "![samples](samples.png)" in report and "frechet/distance" in report
    with Image.open(run / "samples.png") as picture:
        assert picture.size == (4 * 66 + 2, 2 * 66 + 2)
    capsys.readouterr()
    sample = ["sample", "--workdir", str(run), "--rows", "1", "--steps", "2"]
    path = str(tmp_path / "x.png")
    assert main([*sample, "--size", "32x16", "--labels", "1,3", "--output", path]) == 0
    assert capsys.readouterr().out.strip() == path
    with Image.open(path) as picture:
        assert picture.size == (4 * 66 + 2, 130 + 2)
    for wrong, said in (("--size=17", "must divide"), ("--size=8x", "32x48"), ("--labels=9", "9")):
        assert main([*sample, wrong]) == 2
        assert said in capsys.readouterr().err


def test_import_is_lazy():
    done = cli("list")
    assert done.returncode == 0 and "flowformer" in done.stdout
    program = (
        "import sys, jaxformer; assert 'jax' not in sys.modules; jaxformer.fit; jaxformer.load"
    )
    start = time.monotonic()
    subprocess.run([sys.executable, "-c", program], check=True)
    assert time.monotonic() - start < 60  # a hang, not a speed


def test_unknown_public_names_say_what_there_is():
    import jaxformer

    with pytest.raises(AttributeError, match="GradientUpdate"):
        _ = jaxformer.Gradients
    for name in jaxformer.__all__:
        assert getattr(jaxformer, name) is not None
