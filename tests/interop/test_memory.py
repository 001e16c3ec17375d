"""Reading a folder of several files holds at most one of them beside the parameters."""

import json
import os
import subprocess
import sys

import pytest

transformers = pytest.importorskip("transformers")

READ = """
import json, sys, threading
import jax
from jaxformer.interop import huggingface

def held():
    with open("/proc/self/status") as status:
        lines = dict(line.split(":") for line in status)
    return int(lines["RssAnon"].split()[0]) * 1024

def watch():
    while not done.wait(0.001):
        peaks.append(held())

with open(sys.argv[1] + "/config.json") as file:  # to have traced and imported what it needs
    huggingface.port_of(json.load(file)).abstract()
jax.block_until_ready(jax.device_put(jax.numpy.zeros(8)))
before, peaks, done = held(), [], threading.Event()
watcher = threading.Thread(target=watch)
watcher.start()
params = jax.block_until_ready(huggingface.load(sys.argv[1]).params)
done.set()
watcher.join()
size = sum(x.nbytes for x in jax.tree.leaves(params))
print(json.dumps({"above": max(peaks) - before - size, "size": size, "samples": len(peaks)}))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_at_most_one_shard_beside_the_parameters(tmp_path):
    config = transformers.LlamaConfig(
        vocab_size=9000,
        hidden_size=1024,
        intermediate_size=2752,
        num_hidden_layers=5,
        num_attention_heads=8,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path, max_shard_size="42MB")
    shards = [path.stat().st_size for path in tmp_path.glob("*.safetensors")]
    assert len(shards) >= 8
    # Freed memory goes back at once, so that what is counted is held and not kept by malloc.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", READ, str(tmp_path)],
        capture_output=True,
        text=True,
        env=environment,
        check=True,
    )
    found = json.loads(done.stdout)
    assert found["samples"] > 50
    assert found["size"] > 7 * max(shards)
    assert found["above"] <= max(shards)
