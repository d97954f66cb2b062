"""Compiles three layers over the gpu backend for a GPU that is not here, and says what came of it.

python -m tests.kernels.compile_for_gpu h200 [name ...]     prints a line of JSON for every case

Needs the CUDA plugin of JAX and ptxas, but neither a GPU nor its driver:
    pip install --no-deps jax-cuda12-plugin==V jax-cuda12-pjrt==V nvidia-cuda-nvcc-cu12    (V: JAX's version)
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Before JAX is imported: the plugin would look for a driver, and Mosaic is to print what ptxas says.
os.environ.update(JAX_PLATFORMS="cpu", JAX_SKIP_CUDA_CONSTRAINTS_CHECK="1", MOSAIC_GPU_DUMP_PTXAS="1")

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pallas_kernels.mla_ragged_paged_attention import gpu as latent_gpu
from pallas_kernels.mla_ragged_paged_attention.shapes import LAYERS as LATENT_LAYERS
from pallas_kernels.ragged_paged_attention import gpu
from pallas_kernels.ragged_paged_attention.shapes import LAYERS
from tests.kernels.gpu_cases import Case, LatentCase

NUM_LAYERS, NUM_PAGES = 3, 4096


CASES: dict[str, Case | LatentCase] = {
    **{f"{name}, decode": Case(layer, True, 64) for name, layer in LAYERS.items()},
    **{f"{name}, mixed": Case(layer, False, 64) for name, layer in LAYERS.items()},
    "pages of 16, decode": Case(LAYERS["llama-3.1-8b"], True, 16),
    "pages of 16, mixed": Case(LAYERS["llama-3.1-8b"], False, 16),
    "pages of 256, mixed": Case(LAYERS["llama-3.1-8b"], False, 256),
    "trees, mixed": Case(LAYERS["llama-3.1-8b"], False, 64, tree_width=64),
    "a lone decode": Case(LAYERS["llama-3.1-8b"], True, 64, num_seqs=1),
    **{
        f"{dtype} pages, {'decode' if decode_only else 'mixed'}": Case(
            LAYERS["llama-3.1-8b"], decode_only, 64, cache_dtype=jnp.dtype(dtype)
        )
        for dtype in ("int8", "float8_e4m3fn", "float8_e5m2")
        for decode_only in (True, False)
    },
    "float8_e4m3fn pages, head_dim 256, mixed": Case(
        LAYERS["gemma-2-9b"], False, 64, cache_dtype=jnp.float8_e4m3fn
    ),
    "float8_e4m3fn pages, float16, decode": Case(
        LAYERS["qwen3-0.6b"], True, 16, dtype=jnp.float16, cache_dtype=jnp.float8_e4m3fn
    ),
    "float16, mixed": Case(LAYERS["llama-3.1-8b"], False, 64, dtype=jnp.float16),
    **{
        f"{name}, {'decode' if decode_only else 'mixed'}": LatentCase(LATENT_LAYERS[name], decode_only)
        for name in ("deepseek-v3", "deepseek-v3 tp8")
        for decode_only in (True, False)
    },
    "deepseek-v3, pages of 16, decode": LatentCase(LATENT_LAYERS["deepseek-v3"], True, page_size=16),
}


def compile_case(case: Case | LatentCase, device: Any) -> dict[str, Any]:
    """What ptxas and XLA say of three layers whose keys depend on the layer before."""
    mesh = Mesh(np.array([device]), ("device",))

    def array(*shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec()))

    layers, operands = _latent_layers(case, array) if isinstance(case, LatentCase) else _layers(case, array)
    cache, seqs = operands[1], case.num_seqs
    batch = array(seqs, 256), array(seqs), array(seqs + 1)
    with printed() as text, jax.set_mesh(mesh):
        compiled = jax.jit(layers, donate_argnums=1).lower(*operands, *batch).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    name = {"bfloat16": "bf16", "float16": "f16"}.get(cache.dtype.name, cache.dtype.name)
    shape = re.escape(f"{name}[{','.join(map(str, cache.shape))}]")
    copies = rf"= {shape}\S* (copy|transpose|convert|copy-start)\(|= {shape}\S* fusion\(.*calls=\S*copy"
    return {
        "spilled_bytes": sum(map(int, re.findall(r"(\d+) bytes spill stores", text[0]))),
        "registers": max(map(int, re.findall(r"Used (\d+) registers", text[0])), default=0),
        "cache_copies": len(re.findall(copies, compiled.as_text())),
        "cache_bytes": int(np.prod(cache.shape)) * cache.dtype.itemsize,
        "temporary_bytes": memory.temp_size_in_bytes,
    }


def _layers(case: Case, array: Any) -> tuple[Any, tuple[Any, ...]]:
    """Three layers, and their operands but for the batch; the second is the cache."""
    layer, kv_heads = case.layer, case.layer.kv_heads
    cache_shape = (NUM_LAYERS, NUM_PAGES, case.page_size, 2 * kv_heads, layer.head_dim)

    def layers(x: Any, kv_pages: Any, arrays: dict[str, Any], *batch: Any) -> Any:
        options = case.options(arrays)

        def one(index: Any, carry: Any) -> Any:
            x, kv_pages = carry
            k, v = jnp.tanh(x[:, :kv_heads]), jnp.sin(x[:, :kv_heads])
            out, kv_pages, _ = gpu.attend(x, k, v, kv_pages, index, *batch, options)
            return x + out, kv_pages

        return jax.lax.fori_loop(0, NUM_LAYERS, one, (x, kv_pages))

    x = array(case.num_tokens, layer.heads, layer.head_dim, dtype=case.dtype)
    return layers, (x, array(*cache_shape, dtype=case.cache_dtype or case.dtype), case.arrays(array))


def _latent_layers(case: LatentCase, array: Any) -> tuple[Any, tuple[Any, ...]]:
    """The same of latent attention."""

    def layers(x: Any, pages: Any, q_rope: Any, *batch: Any) -> Any:
        def one(index: Any, carry: Any) -> Any:
            x, pages = carry
            new = jnp.tanh(x[:, 0]), jnp.sin(q_rope[:, 0])
            out, pages, _ = latent_gpu.attend(x, q_rope, *new, pages, index, *batch, case.options())
            return x + out, pages

        return jax.lax.fori_loop(0, NUM_LAYERS, one, (x, pages))

    q_latent, q_rope, *_ = case.operands(array)
    cache = array(NUM_LAYERS, NUM_PAGES, case.page_size, case.layer.width, dtype=case.dtype)
    return layers, (q_latent, cache, q_rope)


@contextmanager
def printed() -> Iterator[list[str]]:
    """What compiled code prints to the process's standard output and error; complete at the end."""
    text: list[str] = []
    sys.stdout.flush()
    kept = [os.dup(1), os.dup(2)]
    with tempfile.TemporaryFile("w+b") as file:
        try:
            for stream in (1, 2):
                os.dup2(file.fileno(), stream)
            yield text
        finally:
            for stream, old in zip((1, 2), kept, strict=True):
                os.dup2(old, stream)
                os.close(old)
            file.seek(0)
            text.append(file.read().decode(errors="replace"))


def main() -> None:
    target, *names = sys.argv[1:]
    config = (Path(__file__).parent / "targets" / f"{target}.txtpb").read_text()
    topology = topologies.get_topology_desc(platform="cuda", topology="1x1x1", target_config=config)
    for name in names or CASES:
        report = compile_case(CASES[name], topology.devices[0])
        print(json.dumps({"name": name, **report}), flush=True)


if __name__ == "__main__":
    main()
