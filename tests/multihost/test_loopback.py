"""Real processes on this machine: the same run in one, two and four, and what a lost one does."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from jaxformer.errors import ConfigError
from jaxformer.evaluation.goodput import goodput
from jaxformer.observe.goodput import FILE
from jaxformer.observe.metrics import read_jsonl
from jaxformer.parallel import multihost

pytestmark = pytest.mark.slow
TRAIN = [
    "train",
    "--config=decoder:tiny",
    "--config.steps=40",
    "--config.evaluate.every=20",
    "--config.fit.log_every=1",
    "--config.fit.checkpoint_every=10",
    "--config.fit.keep=9",
]


def losses(workdir):
    """{step: training loss} of a run."""
    rows = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def run(workdir, processes, *more, devices=1, restarts=0):
    verb = ["multihost", f"--processes={processes}", f"--devices={devices}"]
    command = [*verb, f"--restarts={restarts}", "--", *TRAIN, f"--workdir={workdir}", *more]
    return finished(start(command))


def start(command, **environment):
    return subprocess.Popen(
        [sys.executable, "-m", "jaxformer", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu", **environment},
    )


def finished(process):
    text = process.communicate(timeout=240)[0]
    return process.returncode, text


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The losses of one process with two simulated devices."""
    workdir = tmp_path_factory.mktemp("whole")
    code, text = run(workdir, 1, devices=2)
    assert code == 0, text
    return losses(workdir)


def test_two_processes_equal_one(whole, tmp_path):
    code, text = run(tmp_path, 2)
    assert code == 0, text
    found = losses(tmp_path)
    assert sorted(found) == list(range(1, 41))
    assert found == pytest.approx(whole, rel=1e-6)


def test_another_number_of_processes_continues(whole, tmp_path):
    for processes, stop in ((2, 10), (1, 20), (4, 30)):
        code, text = run(tmp_path, processes, f"--stop-after={stop}")
        assert code == 75, text
    code, text = run(tmp_path, 2)
    assert code == 0 and "continue at step 30" in text, text
    # Sums over four devices have another order than over two.
    assert losses(tmp_path) == pytest.approx(whole, rel=1e-5)


def peers(workdir, *more, steps=400):
    """Two processes by hand, so that one of them can be hit."""
    port = 20_000 + os.getpid() % 20_000
    where = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": "2"}
    command = [*TRAIN, f"--workdir={workdir}", f"--config.steps={steps}", *more]
    return [start(command, **where, JAX_PROCESS_ID=str(i)) for i in range(2)]


def saved(workdir):
    """The steps of finished checkpoints."""
    names = [path.name for path in (workdir / "checkpoints").glob("*")]
    return sorted(int(name) for name in names if name.isdigit())


def wait_for_checkpoint(workdir):
    deadline = time.monotonic() + 120
    while not saved(workdir):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_sigterm_stops_all_at_one_step(tmp_path):
    both = peers(tmp_path)
    wait_for_checkpoint(tmp_path)
    both[1].send_signal(signal.SIGTERM)
    results = [finished(p) for p in both]
    assert [code for code, _ in results] == [75, 75], results
    stopped = {line for _, text in results for line in text.splitlines() if "stopped at" in line}
    assert len(stopped) == 1
    step = int(stopped.pop().split("step ")[1].split(";")[0])
    assert saved(tmp_path)[-1] == step


def test_a_killed_process_ends_the_other_with_one_line(tmp_path):
    both = peers(tmp_path)
    wait_for_checkpoint(tmp_path)
    both[1].kill()
    both[1].wait()
    code, text = finished(both[0])
    assert code == 75, text
    assert "process 0 of 2 lost another one" in text.splitlines()[-1]
    last = saved(tmp_path)[-1]
    code, text = run(tmp_path, 2, "--config.steps=400", f"--stop-after={last + 10}")
    assert code == 75 and f"continue at step {last}" in text, text


def test_a_kill_is_continued_from_each_process_own_disk_and_accounted_for(tmp_path):
    disk, workdir = tmp_path / "disk", tmp_path / "run"
    local = [f"--config.fit.local_dir={disk}", "--config.fit.local_every=2"]
    local += ["--config.fit.checkpoint_every=1000", "--config.steps=400"]
    code, text = run(workdir, 2, *local, "--stop-after=4")
    assert code == 75, text
    both = peers(workdir, *local)
    deadline = time.monotonic() + 120
    while not all(list(disk.rglob(f"{i}-of-2/[1-9]?.npz")) for i in range(2)):
        assert time.monotonic() < deadline and both[1].poll() is None
        time.sleep(0.02)
    both[1].kill()
    code, text = finished(both[0])
    assert code == 75, text
    before = losses(workdir)
    assert saved(workdir) == [4]
    code, text = run(workdir, 2, *local, f"--stop-after={max(before) + 2}")
    assert code == 75, text
    (step,) = {int(x.split()[0]) for x in text.split("continue at step ")[1:]}
    assert 10 <= step <= max(before)
    after = losses(workdir)
    assert {k: after[k] for k in before} == before  # also the steps taken again
    account = goodput(workdir)
    assert account.starts == 3 and account.lost["restarts"] > 0
    assert account.lost.get("repeated steps", 0) > 0 or step == max(before)
    rows = list(read_jsonl(workdir / FILE))
    assert account.wall == pytest.approx(rows[-1]["time"] - rows[0]["start"], abs=1)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"JAX_PROCESS_ID": ""}, "JAX_PROCESS_ID: not set, but JAX_COORDINATOR_ADDRESS"),
        ({"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES: 'two' is not a number"),
        ({"JAX_PROCESS_ID": "2"}, "JAX_PROCESS_ID: 2, but there are only 2"),
        ({"JAX_COORDINATOR_ADDRESS": "here"}, "JAX_COORDINATOR_ADDRESS: 'here' needs host:port"),
    ],
)
def test_a_wrong_environment_is_named(changes, message):
    right = {
        "JAX_COORDINATOR_ADDRESS": "127.0.0.1:1",
        "JAX_NUM_PROCESSES": "2",
        "JAX_PROCESS_ID": "0",
    }
    with pytest.raises(ConfigError, match=message):
        multihost.start({**right, **changes})


def test_peers_that_never_come_are_a_line(tmp_path):
    where = {"JAX_COORDINATOR_ADDRESS": "127.0.0.1:19", "JAX_NUM_PROCESSES": "2"}
    code = (
        "from jaxformer.parallel import multihost\n"
        "try: multihost.start(wait=2)\n"
        "except multihost.PeersLost as error: print('line:', error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "JAX_PLATFORMS": "cpu", **where, "JAX_PROCESS_ID": "1"},
    )
    assert "line: nobody listened at 127.0.0.1:19 within 2 s" in done.stdout, done.stderr
