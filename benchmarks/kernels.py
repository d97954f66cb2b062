"""Times the attention op: every backend that the machine has, over the named shapes, against the ceilings.

    python -m benchmarks.kernels --layer llama-3.1-8b --plot roofline.png

Every call takes another layer of a cache whose pages stand in random order, as in a model. Bytes are those
of the keys and values that some query sees, of the queries, the output and the new tokens; the floor is the
larger of bytes over the measured copy bandwidth and FLOPs over the measured matrix products. `dense` is
attention as plain JAX has it over keys and values that have been gathered already, `cudnn` that of cuDNN
through JAX, `torch` PyTorch's scaled_dot_product_attention; they look up no pages and write none.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from tqdm import tqdm

from benchmarks.machine import Machine, measure
from benchmarks.report import add_output_arguments, figure, print_table, save, write_json
from pallas_kernels.ragged_paged_attention import BACKENDS, Backend, ragged_paged_attention
from pallas_kernels.ragged_paged_attention.shapes import LAYERS, WORKS, LayerShape, Work

PEERS = ("dense", "cudnn", "torch")
MAX_LAYERS = 4


@dataclass(frozen=True, slots=True)
class Timing:
    """One implementation at one shape.

    Attributes:
        seconds: of one call, the median over repeats.
        num_bytes, flops: that a call cannot do without.
        floor: seconds below which the machine cannot be.
    """

    layer: str
    work: str
    implementation: str
    seconds: float
    num_bytes: int
    flops: int
    floor: float


class Setting:
    """The operands of one shape, of random numbers, on the default device.

    Args:
        num_layers: of the cache.
    """

    def __init__(
        self, layer: LayerShape, work: Work, dtype: Any, page_size: int, num_layers: int, seed: int
    ) -> None:
        self.layer, self.work, self.dtype = layer, work, dtype
        self.num_layers = num_layers
        rng = np.random.default_rng(seed)
        lengths = np.array([cached + new for cached, new in work.sequences])
        pages_of = -(-lengths // page_size)
        num_pages = 1 + int(pages_of.sum())
        order = 1 + rng.permutation(num_pages - 1)
        table = np.zeros((len(lengths), int(pages_of.max())), np.int32)
        for row, end, count in zip(table, np.cumsum(pages_of), pages_of, strict=True):
            row[:count] = order[end - count : end]
        starts = np.concatenate([[0], np.cumsum([new for _, new in work.sequences])])
        self.lengths = [jnp.asarray(x, jnp.int32) for x in (table, lengths, starts)]
        keys = jax.random.split(jax.random.key(seed), 4)
        tokens = work.num_tokens
        self.q = jax.random.normal(keys[0], (tokens, layer.heads, layer.head_dim), dtype)
        self.k, self.v = (
            jax.random.normal(key, (tokens, layer.kv_heads, layer.head_dim), dtype) for key in keys[1:3]
        )
        cache = (num_layers, num_pages, page_size, 2 * layer.kv_heads, layer.head_dim)
        self.kv_pages = jax.jit(functools.partial(jax.random.normal, shape=cache, dtype=dtype))(keys[3])
        self.options: dict[str, Any] = {
            "scale": layer.head_dim**-0.5,
            "window": layer.window,
            "soft_cap": layer.soft_cap,
            "decode_only": work.decode_only,
        }
        if layer.sinks:
            self.options["sinks"] = jnp.zeros(layer.heads)
        if layer.alibi:
            self.options["alibi_slopes"] = 2.0 ** -jnp.linspace(0.25, 8, layer.heads)
        if layer.spans:
            self.options["span_ends"] = jnp.zeros(tokens, jnp.int32)

    def calls(self, backend: Backend, tiling: Any = None) -> Callable[[int], None]:
        """Runs the op so many times, one after the other, each on the next layer."""
        options, num_layers = self.options, self.num_layers

        @functools.partial(jax.jit, donate_argnums=(3,))
        def run(q, k, v, kv_pages, tables, count):  # type: ignore[no-untyped-def]
            def once(index, carry):  # type: ignore[no-untyped-def]
                kv_pages, _ = carry
                out, kv_pages = ragged_paged_attention(
                    q, k, v, kv_pages, index % num_layers, *tables, backend=backend, tiling=tiling, **options
                )
                return kv_pages, out

            return lax.fori_loop(0, count, once, (kv_pages, jnp.zeros_like(q)))

        def calls(count: int) -> None:
            self.kv_pages, out = run(self.q, self.k, self.v, self.kv_pages, self.lengths, count)
            out.block_until_ready()

        return calls

    def dense(self) -> tuple[jax.Array, jax.Array, jax.Array] | None:
        """q [S, N, heads, D] and k, v [S, L, kv_heads, D] without pages; None if lengths differ."""
        (cached, new), *others = self.work.sequences
        if any(other != (cached, new) for other in others):
            return None
        table, layer = self.lengths[0], self.layer
        context = self.kv_pages[0, table].reshape(len(table), -1, layer.kv_heads, 2, layer.head_dim)
        context = context[:, : cached + new]
        q = self.q.reshape(len(table), new, layer.heads, layer.head_dim)
        return q, context[..., 0, :], context[..., 1, :]


def peer_calls(peer: str, setting: Setting) -> Callable[[int], None] | None:
    """The same for a peer; None where it is not there or has no such attention."""
    layer = setting.layer
    if layer.soft_cap is not None or layer.sinks or layer.alibi or layer.spans or layer.window is not None:
        return None
    operands = setting.dense()
    if operands is None:
        return None
    return _torch_calls(*operands) if peer == "torch" else _jax_calls(peer, *operands)


def _jax_calls(peer: str, q: jax.Array, k: jax.Array, v: jax.Array) -> Callable[[int], None] | None:
    on_gpu = jax.default_backend() == "gpu"
    if peer == "cudnn" and (not on_gpu or q.dtype == jnp.float32):
        return None
    num_queries, num_keys = q.shape[1], k.shape[1]
    if peer == "dense" and 3 * q.shape[0] * q.shape[2] * num_queries * num_keys * 4 > free_bytes() // 2:
        return None  # its logits would not fit

    run = plain_attention("cudnn" if peer == "cudnn" else "xla")

    def calls(count: int) -> None:
        for _ in range(count):
            out = run(q, k, v)
        out.block_until_ready()

    return calls


def plain_attention(implementation: Literal["cudnn", "xla"]) -> Any:
    """JAX's own attention of q [S, N, heads, D], whose queries are the last of the keys, compiled."""

    @jax.jit
    def attend(q, k, v):  # type: ignore[no-untyped-def]
        num_queries, num_keys = q.shape[1], k.shape[1]
        given: dict[str, Any] = {"is_causal": num_queries == num_keys}
        if 1 < num_queries < num_keys:
            given["mask"] = jnp.tril(jnp.ones((1, 1, num_queries, num_keys), bool), num_keys - num_queries)
        return jax.nn.dot_product_attention(q, k, v, implementation=implementation, **given)

    return attend


def _torch_calls(*operands: jax.Array) -> Callable[[int], None] | None:
    try:
        import torch
        from torch.nn.attention.bias import causal_lower_right
    except ImportError:
        return None
    if jax.default_backend() == "gpu" and not torch.cuda.is_available():
        return None
    q, k, v = (torch.from_dlpack(x).transpose(1, 2) for x in operands)
    num_queries, num_keys = q.shape[2], k.shape[2]
    mask = causal_lower_right(num_queries, num_keys) if 1 < num_queries < num_keys else None
    is_causal = num_queries == num_keys > 1

    def calls(count: int) -> None:
        with torch.inference_mode():
            for _ in range(count):
                torch.nn.functional.scaled_dot_product_attention(
                    q, k, v, attn_mask=mask, is_causal=is_causal, enable_gqa=True
                )
        if q.is_cuda:
            torch.cuda.synchronize()

    return calls


def seconds_of(calls: Callable[[int], None], repeats: int, at_least: float) -> float:
    """The median time of a call, over repeats of so many calls that one repeat takes `at_least` seconds."""
    calls(1)
    start = time.perf_counter()
    calls(1)
    count = max(1, min(1000, round(at_least / max(time.perf_counter() - start, 1e-7))))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        calls(count)
        times.append((time.perf_counter() - start) / count)
    return float(np.median(times))


def free_bytes() -> int:
    from jaxllm.execution.platform import free_memory

    return free_memory(jax.devices()[0])[1]


def layers_that_fit(layer: LayerShape, work: Work, dtype: Any) -> int:
    """Layers of the cache that a quarter of the free memory holds, of those that are wanted."""
    tokens = sum(cached + new for cached, new in work.sequences)
    return min(MAX_LAYERS, free_bytes() // 4 // (layer.kv_bytes_per_token(dtype.itemsize) * tokens))


def backends_here(dtype: Any) -> list[Backend]:
    """The backends that this machine can run, the oracle left out."""
    if jax.default_backend() == "tpu":
        return ["xla", "tpu"]
    if jax.default_backend() == "gpu":
        capability = float(jax.devices()[0].compute_capability)
        has_triton = importlib.util.find_spec("jax_triton") is not None
        triton: list[Backend] = ["triton"] if has_triton and capability >= 8.0 else []
        mosaic: list[Backend] = ["gpu"] if capability >= 9.0 and dtype != jnp.float32 else []
        return ["xla", *triton, *mosaic]
    return ["xla"]


def run(options: argparse.Namespace, machine: Machine) -> Iterator[Timing]:
    """Times what was asked for; what does not fit or would take too long is said and left out."""
    dtype = jnp.dtype(options.dtype or ("float32" if machine.platform == "cpu" else "bfloat16"))
    implementations = options.backend or [*backends_here(dtype), *PEERS]
    pairs = [(layer, work) for layer in options.layer for work in options.work]
    for layer_name, work_name in tqdm(pairs, desc="Timing", unit="shape"):
        layer, work = LAYERS[layer_name], WORKS[work_name]
        flops = work.flops(layer)
        num_bytes = layer.kv_bytes_per_token(dtype.itemsize) * (
            work.keys_read(layer.window) + work.num_tokens
        )
        num_bytes += 2 * work.num_tokens * layer.heads * layer.head_dim * dtype.itemsize
        floor = max(num_bytes / machine.copy_bandwidth, flops / machine.flops(dtype.name))
        num_layers = layers_that_fit(layer, work, dtype)
        if num_layers < 1 or floor > options.longest:
            why = "its cache does not fit" if num_layers < 1 else f"it takes {floor:.1f} s at best"
            tqdm.write(f"{layer_name}, {work_name}: left out, {why}")
            continue
        setting = Setting(layer, work, dtype, options.page_size, num_layers, options.seed)
        for name in implementations:
            calls = setting.calls(name) if name in BACKENDS else peer_calls(name, setting)
            if calls is not None:
                seconds = seconds_of(calls, options.repeats, options.at_least)
                yield Timing(layer_name, work_name, name, seconds, num_bytes, flops, floor)
        del setting


def print_timings(timings: list[Timing], machine: Machine, title: str) -> None:
    columns = [
        "layer",
        "batch",
        "by",
        "ms",
        "GB/s",
        "of copy",
        "GFLOP/s",
        "of product",
        "over floor",
        "vs best peer",
    ]
    rows: list[list[object]] = []
    for timing in timings:
        peers = [
            t.seconds
            for t in timings
            if (t.layer, t.work) == (timing.layer, timing.work) and t.implementation in PEERS
        ]
        bandwidth, rate = timing.num_bytes / timing.seconds, timing.flops / timing.seconds
        is_ours = timing.implementation in BACKENDS
        rows.append(
            [
                timing.layer,
                timing.work,
                timing.implementation,
                f"{timing.seconds * 1e3:.3f}",
                f"{bandwidth / 1e9:,.1f}",
                f"{bandwidth / machine.copy_bandwidth:.0%}",
                f"{rate / 1e9:,.0f}",
                f"{rate / max(machine.matmul_flops.values()):.0%}",
                f"{timing.seconds / timing.floor:.2f}",
                f"{min(peers) / timing.seconds:.2f}" if peers and is_ours else "",
            ]
        )
    note = f"{machine.describe()}; `vs best peer` above 1: faster than any of {', '.join(PEERS)}"
    print_table(title, columns, rows, note=note)


def draw(timings: list[Timing], machine: Machine, path: Path) -> None:
    """A roofline (Williams et al. 2009): FLOP/s over FLOPs per byte."""
    picture, axes = figure(9, 6)
    intensities = [t.flops / t.num_bytes for t in timings]
    line = np.geomspace(min(intensities) / 2, max(intensities) * 2, 100)
    ceiling = max(machine.matmul_flops.values())
    axes.plot(line, np.minimum(line * machine.copy_bandwidth, ceiling), color="black", label="ceiling")
    for index, name in enumerate(dict.fromkeys(t.implementation for t in timings)):
        own = [t for t in timings if t.implementation == name]
        axes.scatter(
            [t.flops / t.num_bytes for t in own],
            [t.flops / t.seconds for t in own],
            marker="os^Dvx"[index % 6],
            alpha=0.7,
            label=name,
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("FLOPs per byte")
    axes.set_ylabel("FLOP/s")
    axes.set_title(machine.device)
    axes.legend()
    save(picture, path)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__.split("\n")[0])
    several: Any = {"action": "extend", "nargs": "+", "metavar": "NAME"}
    parser.add_argument("--layer", choices=sorted(LAYERS), help="default: all", **several)
    parser.add_argument("--work", choices=sorted(WORKS), help="default: all", **several)
    parser.add_argument(
        "--backend", choices=[*BACKENDS, *PEERS], help="default: all that run here", **several
    )
    parser.add_argument("--dtype", help="default: float32 on CPU, else bfloat16")
    parser.add_argument("--page-size", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--at-least", type=float, default=0.05, help="seconds of calls in a repeat")
    parser.add_argument(
        "--longest", type=float, default=1.0, help="leave out what takes longer at best, in s"
    )
    parser.add_argument("--seed", type=int, default=0)
    add_output_arguments(parser)
    options = parser.parse_args(arguments)
    options.layer = options.layer or list(LAYERS)
    options.work = options.work or list(WORKS)
    machine = measure()
    timings = list(run(options, machine))
    print_timings(timings, machine, f"attention, pages of {options.page_size} tokens")
    write_json(options.json, {"machine": machine, "timings": timings})
    if options.plot and timings:
        draw(timings, machine, options.plot)


if __name__ == "__main__":
    main()
