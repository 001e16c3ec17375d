"""Authors' weight files, as the golden cases hold them, become runs of their papers' configs."""

import numpy as np
import pytest

from jaxformer.cli import main
from jaxformer.errors import ConfigError
from jaxformer.tools.convert import import_authors
from jaxformer.tools.subject import open_subject
from tests.golden_case import DIRECTORY, Case


def pfn_file(folder, kind):
    """The weights of the authors' transformer in a file of that kind, and the fields they fit."""
    case = Case(DIRECTORY / "pfn__transformer_model.npz")
    c, weights = case.config, case.part("param")
    path = folder / f"weights{kind}"
    if kind == ".npz":
        np.savez(path, **weights)
    elif kind == ".safetensors":
        from safetensors.numpy import save_file

        save_file(weights, path)
    else:
        torch = pytest.importorskip("torch")
        state = {f"module.{name}": torch.tensor(x) for name, x in weights.items()}
        torch.save({"epoch": 3, "state_dict": state}, path)
    fields = {
        "model__width": c["ninp"],
        "model__depth": c["nlayers"],
        "model__heads": c["nhead"],
        "model__hidden": c["nhid"],
        "criterion__bars": c["n_out"],
    }
    return path, weights, fields


@pytest.mark.parametrize("kind", [".npz", ".safetensors", ".pth"])
def test_weights_become_a_run(tmp_path, kind):
    path, weights, fields = pfn_file(tmp_path, kind)
    fields["data__arguments__features"] = weights["encoder.weight"].shape[1]
    run = import_authors("pfn", path, tmp_path / "run", config="pfn:tiny", **fields)
    params = open_subject(run).state.params
    np.testing.assert_array_equal(params["head"]["kernel"], weights["decoder.2.weight"].T)


def test_weights_of_another_size_are_named(tmp_path, capsys):
    path, _, _ = pfn_file(tmp_path, ".npz")
    command = ["import", str(path), "--paper", "pfn", "--config", "pfn:tiny"]
    assert main([*command, "--workdir", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert "set the config's fields to those the weights are of" in said or "is missing" in said
    assert not (tmp_path / "run").exists()


def test_a_paper_without_a_whole_mapping_is_named(tmp_path):
    path, _, _ = pfn_file(tmp_path, ".npz")
    with pytest.raises(ConfigError, match="urpe has no mapping of its authors' weights"):
        import_authors("urpe", path, tmp_path / "run")


def test_weights_of_another_paper_are_named(tmp_path):
    path, _, _ = pfn_file(tmp_path, ".npz")
    with pytest.raises(ConfigError, match=r"tensor 'transformer\.wte\.weight' is missing"):
        import_authors("flowformer", path, tmp_path / "run", config="flowformer:tiny")
