"""A run goes on with its layers in a loop, and comes back."""

import jax
import numpy as np
import pytest

from jaxformer import cli, paths
from jaxformer.catalogue import load
from jaxformer.observe.metrics import read_jsonl
from jaxformer.tools.subject import run_config
from jaxformer.train.fit import FitOptions, Interrupted, fit
from jaxformer.train.states import restore


def losses(workdir):
    return {r["step"]: r["loss"] for r in read_jsonl(workdir / "metrics.jsonl") if "loss" in r}


def test_a_run_continues_scanned_and_comes_back(tmp_path, one_device, capsys):
    def recipe(scan):
        return load(
            "decoder:tiny", steps=12, model__scan=scan, evaluate__batches=1, gradient__ema=0.9
        )

    plain, loop, back = (tmp_path / name for name in ("plain", "loop", "back"))
    options = {"log_every": 1, "progress": False}
    with pytest.raises(Interrupted):
        stop = FitOptions(stop_after=6, **options)
        fit(recipe(False), workdir=plain, mesh=one_device, options=stop)
    assert cli.main(["convert", str(plain), str(loop), "--layers", "stacked"]) == 0
    assert run_config(loop).model.scan
    assert cli.main(["convert", str(loop), str(back), "--layers", "unrolled"]) == 0

    def arrays(workdir):
        state = restore(recipe(False), workdir, mesh=one_device)
        return paths.leaves(jax.device_get(state.replace(key=jax.random.key_data(state.key))))

    jax.tree.map(np.testing.assert_array_equal, arrays(back), arrays(plain))
    for workdir, scan in ((plain, False), (loop, True)):
        fit(recipe(scan), workdir=workdir, mesh=one_device, options=FitOptions(**options))
    expected = {step: loss for step, loss in losses(plain).items() if step > 6}
    assert losses(loop) == pytest.approx(expected, rel=1e-5)
    assert cli.main(["convert", str(plain), str(loop), "--layers", "stacked"]) == 2
    assert "exists already" in capsys.readouterr().err
