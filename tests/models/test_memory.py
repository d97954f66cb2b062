"""Peak host memory of loading stays near the weights' own bytes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.models.checkpoints import LLAMA, llama_tensors, write_model

_CODE = """
import sys
from pathlib import Path
import jax, jax.numpy as jnp
from jaxllm.models.decoder import parameter_specs
from jaxllm.models.families import translate_config
from jaxllm.models.hub import read_config
from jaxllm.models.loader import load_parameters

def status(field):
    line = next(line for line in open("/proc/self/status") if line.startswith(field))
    return int(line.split()[1]) * 1024

path = Path(sys.argv[1])
config = translate_config(read_config(path))
specs = parameter_specs(config)
jnp.zeros(3).block_until_ready()
before = status("VmRSS")
parameters = load_parameters(path, config, specs, dtype=sys.argv[2], stack_layers=sys.argv[3] == "stack")
jax.block_until_ready(parameters)
print(status("VmHWM") - before, sum(x.nbytes for x in jax.tree.leaves(parameters)))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc, which only Linux has")
@pytest.mark.parametrize(
    ("dtype", "layout"), [("float32", "list"), ("float32", "stack"), ("bfloat16", "list")]
)
def test_peak_memory_is_at_most_1_3_times_the_weights(tmp_path: Path, dtype: str, layout: str) -> None:
    sizes = {12: 1024, 24: 2048, 10: 2560, 22: 6000}
    config = json.loads(json.dumps(LLAMA)) | {
        "hidden_size": 1024,
        "intermediate_size": 2560,
        "vocab_size": 6000,
        "head_dim": 512,
    }
    tensors = {
        name: np.full([sizes[n] for n in value.shape], 0.5, np.float32)
        for name, value in llama_tensors().items()
    }
    write_model(tmp_path, tensors, config)
    result = subprocess.run(
        [sys.executable, "-c", _CODE, str(tmp_path), dtype, layout], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    peak, weights = map(int, result.stdout.split())
    assert weights == sum(value.size for value in tensors.values()) * (4 if dtype == "float32" else 2)
    assert peak <= 1.3 * weights, f"{peak / weights:.2f} times the weights"
