"""Compiles the Triton kernel for a GPU that is not here, and says what came of it.

python -m tests.kernels.compile_triton 80 [name ...]     prints a line of JSON for every kernel

The number is a compute capability. Needs Triton, which brings an assembler; neither a GPU nor JAX's plugin.
"""

from __future__ import annotations

import functools
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pallas_kernels.mla_ragged_paged_attention import triton as latent_backend
from pallas_kernels.mla_ragged_paged_attention.shapes import LAYERS as LATENT_LAYERS
from pallas_kernels.ragged_paged_attention import triton as backend
from pallas_kernels.ragged_paged_attention.shapes import LAYERS
from tests.kernels.gpu_cases import Case, LatentCase

_TYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "int32": "i32", "int8": "i8"}


LLAMA = LAYERS["llama-3.1-8b"]
CASES: dict[str, Case | LatentCase] = {
    **{f"{name}, decode": Case(layer, True) for name, layer in LAYERS.items()},
    **{f"{name}, mixed": Case(layer, False) for name, layer in LAYERS.items()},
    "trees, mixed": Case(LLAMA, False, tree_width=64),
    "float16, mixed": Case(LLAMA, False, dtype=jnp.float16),
    "float32, mixed": Case(LLAMA, False, dtype=jnp.float32),
    **{
        f"{dtype} pages, decode": Case(LLAMA, True, cache_dtype=jnp.dtype(dtype))
        for dtype in ("int8", "float8_e4m3fn", "float8_e5m2")
    },
    "float8_e4m3fn pages, mixed": Case(LLAMA, False, cache_dtype=jnp.float8_e4m3fn),
    **{f"{name}, decode": LatentCase(layer, True) for name, layer in LATENT_LAYERS.items()},
    **{f"{name}, mixed": LatentCase(layer, False) for name, layer in LATENT_LAYERS.items()},
    "deepseek-v3, float32, mixed": LatentCase(LATENT_LAYERS["deepseek-v3"], False, dtype=jnp.float32),
}


def launches(case: Case | LatentCase) -> list[backend.Launch]:
    """The kernels that a call of the op runs, with operands that have no values."""
    found = []

    def array(*shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    def record(launch: backend.Launch) -> tuple[jax.Array, jax.Array]:
        found.append(launch)
        out, lse = (jnp.zeros(result.shape, result.dtype) for result in launch.results)
        return out, lse

    seqs = case.num_seqs
    batch = array(), array(seqs, 8192 // case.page_size), array(seqs), array(seqs + 1)
    if isinstance(case, LatentCase):
        attend_latent = functools.partial(latent_backend.attend, options=case.options(), launch=record)
        jax.eval_shape(attend_latent, *case.operands(array), *batch)
        return found
    layer, tokens, arrays = case.layer, case.num_tokens, case.arrays(array)

    def attend(arrays: dict[str, Any], *operands: Any) -> Any:
        return backend.attend(*operands, case.options(arrays), launch=record)

    dtype = case.dtype
    new = array(tokens, layer.kv_heads, layer.head_dim, dtype=dtype)
    cache = (2, 4096, case.page_size, 2 * layer.kv_heads, layer.head_dim)
    jax.eval_shape(
        attend,
        arrays,
        array(tokens, layer.heads, layer.head_dim, dtype=dtype),
        new,
        new,
        array(*cache, dtype=case.cache_dtype or dtype),
        *batch,
    )
    return found


def compile_launch(launch: backend.Launch, capability: int) -> dict[str, int]:
    """What Triton and the assembler say of a kernel: registers of a thread, bytes spilled, shared memory."""
    pointers = [array.dtype.name for array in (*launch.operands, *launch.results)]
    kernel = launch.load()
    names = kernel.arg_names
    signature = {
        **{name: f"*{_TYPES[dtype]}" for name, dtype in zip(names, pointers, strict=False)},
        **dict.fromkeys(launch.constants, "constexpr"),
    }
    # As jax-triton has it: buffers of XLA are aligned.
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(len(pointers))}
    source = ASTSource(kernel, signature, launch.constants, aligned)
    options = {"num_warps": launch.cut.warps, "num_stages": launch.cut.stages}
    said = []

    def assemble(ptx: str, metadata: dict[str, Any]) -> bytes:
        arch = re.search(r"\.target (sm_\w+)", ptx)
        assert arch is not None
        with tempfile.TemporaryDirectory() as folder:
            source, cubin = Path(folder, "kernel.ptx"), Path(folder, "cubin")
            source.write_text(ptx)
            command = [triton.knobs.nvidia.ptxas.path, "-v", f"-arch={arch[1]}", source, "-o", cubin]
            said.append(subprocess.run(command, capture_output=True, text=True, check=True).stderr)
            return cubin.read_bytes()

    def with_our_assembler(backend: Any = None, stages: Any = None, *_: Any) -> tuple[str, str]:
        """In place of Triton's own call of it, which says nothing. Without arguments: a cache's key."""
        if stages is not None:
            stages["cubin"] = assemble
        return "", ""

    with triton.knobs.runtime.scope(), triton.knobs.compilation.scope():
        triton.knobs.runtime.add_stages_inspection_hook = with_our_assembler
        triton.knobs.compilation.always_compile = True
        compiled = triton.compile(source, GPUTarget("cuda", capability, 32), options)
    return {
        "registers": max(map(int, re.findall(r"Used (\d+) registers", said[0]))),
        "spilled_bytes": sum(map(int, re.findall(r"(\d+) bytes spill stores", said[0]))),
        "shared_bytes": compiled.metadata.shared,
        "tensor_core_products": len(re.findall(r"mma\.sync|wgmma\.mma", compiled.asm["ptx"])),
    }


def kind_of(launch: backend.Launch) -> tuple[Any, ...]:
    """What a kernel's code depends on: not sizes that only addresses are computed from."""
    sizes = {"ITEMS", "TILES", "KV_HEADS", "PAGES", "PAGES_PER_SEQ", "GIVEN"}
    constants = tuple(item for item in launch.constants.items() if item[0] not in sizes)
    dtypes = tuple(array.dtype.name for array in (*launch.operands, *launch.results))
    return launch.kernel, constants, dtypes, launch.cut.warps, launch.cut.stages


def main() -> None:
    capability, *names = sys.argv[1:]
    reports: dict[tuple[Any, ...], dict[str, int]] = {}
    for name in names or CASES:
        for launch in launches(CASES[name]):
            kind = kind_of(launch)
            if kind not in reports:
                reports[kind] = compile_launch(launch, int(capability))
            print(json.dumps({"name": name, "rows": launch.cut.rows, **reports[kind]}), flush=True)


if __name__ == "__main__":
    main()
