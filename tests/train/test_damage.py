"""Damaged checkpoints and full disks: never a wrong array, never a lost whole checkpoint."""

import contextlib
import errno
import os
import random
import shutil
import subprocess

import jax
import numpy as np
import pytest
from etils import epath

from jaxformer.storage.digest import CheckpointDamaged
from jaxformer.storage.failures import CheckpointFailed
from jaxformer.train.checkpoint import Checkpoints
from jaxformer.train.fit import FitOptions, fit
from jaxformer.train.states import restore
from tests.train.problem import phase, recipe

OPTIONS = FitOptions(progress=False, checkpoint_every=5, keep=None)


def same(a, b):
    pairs = zip(jax.tree.leaves(a.replace(key=0)), jax.tree.leaves(b.replace(key=0)), strict=True)
    return all(np.array_equal(x, y) for x, y in pairs)


@pytest.fixture(scope="module")
def whole(one_device, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole")
    return workdir, fit(recipe(), workdir=workdir, mesh=one_device, options=OPTIONS)


def missing(path):
    path.unlink()


def truncated(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flipped(path):
    data, draw = bytearray(path.read_bytes()), random.Random(path.name)
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [missing, truncated, flipped])
def test_damage_of_any_file_is_noticed(damage, whole, tmp_path, capfd):
    shutil.copytree(whole[0], tmp_path, dirs_exist_ok=True)
    newest = tmp_path / "checkpoints" / "20"
    files = [p for p in newest.rglob("*") if p.is_file() and not p.name.startswith("digest.")]
    assert len(files) > 10
    with Checkpoints(tmp_path) as checkpoints:
        for file in files:
            kept = file.read_bytes()
            damage(file)
            with pytest.raises(CheckpointDamaged, match=file.name.replace(".", r"\.")):
                checkpoints.verify(20)
            file.write_bytes(kept)
        checkpoints.verify(20)
    assert capfd.readouterr().err == ""


def test_a_flipped_page_of_checksums_is_noticed(whole, tmp_path):
    shutil.copytree(whole[0], tmp_path, dirs_exist_ok=True)
    flipped(tmp_path / "checkpoints" / "20" / "digest.0-of-1.json")
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.newest() == 15


def test_without_a_page_the_checkpoint_is_used(whole, tmp_path):
    shutil.copytree(whole[0], tmp_path, dirs_exist_ok=True)
    (tmp_path / "checkpoints" / "20" / "digest.0-of-1.json").unlink()
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.newest() == 20


def test_the_newest_whole_one_is_continued_and_reaches_the_same_end(
    whole, one_device, tmp_path, capfd
):
    shutil.copytree(whole[0], tmp_path, dirs_exist_ok=True)
    for step in ("15", "20"):
        largest = max(
            (tmp_path / "checkpoints" / step).rglob("d/*"), key=lambda p: p.stat().st_size
        )
        flipped(largest)
    state = fit(recipe(), workdir=tmp_path, mesh=one_device, options=OPTIONS)
    assert same(state, whole[1])
    said = [line for line in capfd.readouterr().err.splitlines() if "damaged" in line]
    assert [line.split()[1] for line in said] == ["20", "15"]
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps() == [5, 10, 15, 20] and checkpoints.newest() == 20


def test_nothing_whole_is_an_error_not_a_new_start(whole, one_device, tmp_path):
    shutil.copytree(whole[0], tmp_path, dirs_exist_ok=True)
    for step in ("5", "10", "15", "20"):
        missing(tmp_path / "checkpoints" / step / "state" / "manifest.ocdbt")
    with pytest.raises(CheckpointDamaged, match="no whole checkpoint is left"):
        fit(recipe(), workdir=tmp_path, mesh=one_device, options=OPTIONS)


@contextlib.contextmanager
def small_disk(path, size):
    path.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", path])
    if done.returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", path], check=True)


def test_a_full_disk_is_one_line_and_costs_nothing_that_was_saved(one_device, tmp_path, capfd):
    r = recipe(phase("train", 40))
    expected = fit(r, workdir=tmp_path / "whole", mesh=one_device, options=OPTIONS)
    with small_disk(tmp_path / "disk", "256k") as disk:
        with pytest.raises(CheckpointFailed, match=r"the disk is full.*free some space") as failed:
            fit(r, workdir=disk / "run", mesh=one_device, options=OPTIONS)
        with Checkpoints(disk / "run") as checkpoints:
            left = checkpoints.steps()  # with the one, if only its checksums found no room
            assert left and f"newest whole one is {left[-1]}" in str(failed.value)
            for step in left:
                checkpoints.verify(step)
        assert capfd.readouterr().err == ""  # the line is the exception's
        subprocess.run(["mount", "-o", "remount,size=16m", disk], check=True)
        assert same(fit(r, workdir=disk / "run", mesh=one_device, options=OPTIONS), expected)
        assert same(restore(r, disk / "run", mesh=one_device), expected)


def test_a_full_disk_at_the_checksums_leaves_a_whole_checkpoint(whole, tmp_path, monkeypatch):
    state = whole[1]
    kind = type(epath.Path())
    rename = kind.rename

    def full(path, target):
        if path.name.startswith("digest."):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return rename(path, target)

    monkeypatch.setattr(kind, "rename", full)
    with pytest.raises(CheckpointFailed) as failed, Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(20, state, {"phase": 0})
        checkpoints.wait()
    assert str(failed.value).startswith("the checksums of checkpoint 20 could not be written")
    assert "the disk is full; the newest whole one is 20" in str(failed.value)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.newest() == 20
        assert not list((tmp_path / "checkpoints" / "20").glob("digest.*"))
