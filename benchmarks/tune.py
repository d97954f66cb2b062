"""Finds the attention tiles that suit this kind of device, and writes the table that the op then goes by.

    python -m benchmarks.tune --layer qwen3-8b llama-3.1-8b

For each layer, and for decodes and mixed steps apart, every candidate runs over the named batches of that
kind; the one with the least geometric mean of times, each over that of what is chosen without a table, is
kept. Shapes that the table holds already and that are not tuned again stay in it.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from benchmarks.attention import LAYERS, Passes, Setting, Shape, backends_here, layers_that_fit
from benchmarks.report import add_output_arguments, print_table, write_json
from pallas_kernels.mla_ragged_paged_attention.shapes import LatentShape
from pallas_kernels.mla_ragged_paged_attention.tuned import shape_key as latent_shape_key
from pallas_kernels.ragged_paged_attention import BACKENDS, tpu_work, tuned, xla
from pallas_kernels.ragged_paged_attention.shapes import WORKS, LayerShape

DECODES = ("decode 1 x 32k", "decode 8 x 8k", "decode 64 x 1k", "decode 64 x 8k", "decode 256 x 1k")
WITHOUT_TILES = ("reference", "cpu")
MIXED = ("prefill 512", "prefill 2k", "prefill 16 x 512", "mixed 64 x 2k and 1984")


@dataclass(frozen=True, slots=True)
class Choice:
    """What was found for one shape.

    Attributes:
        over_default: geometric mean of its times over those without a table; 1 where nothing was better.
        tiling: None where that is best which is chosen without a table.
    """

    backend: str
    shape: str
    num_candidates: int
    over_default: float
    tiling: Any


def candidates(backend: str, layer: Shape, page_size: int, *, decode_only: bool) -> Iterator[Any]:
    """Tilings that may be worth trying; some may be refused by the compiler."""
    if backend == "xla" and decode_only:
        for block, most in itertools.product((32, 64, 128, 256), (8, 16, 32, 64)):
            yield xla.Tiling(decode_block=block, decode_lanes=(4, most))
    elif backend == "xla":
        for long, short in itertools.product(
            ((128, 128), (128, 256), (256, 256), (256, 512)), ((32, 64), (64, 128))
        ):
            yield xla.Tiling(long_tiles=long, short_tiles=short)
    elif backend == "tpu":
        keys = [k for k in (128, 256, 512, 1024, 2048, 4096) if k % page_size == 0]
        for queries, k in itertools.product((1,) if decode_only else (16, 32, 64, 128, 256), keys):
            yield tpu_work.Tiling(queries, k)
    elif backend == "gpu" and isinstance(layer, LayerShape):
        yield from _gpu_candidates(layer, decode_only)
    elif backend == "gpu":
        yield from _latent_gpu_candidates(decode_only)
    elif backend == "triton" and isinstance(layer, LayerShape):
        yield from _triton_candidates(layer, decode_only)
    elif backend == "triton":
        yield from _latent_triton_candidates(decode_only)


def _gpu_candidates(layer: LayerShape, decode_only: bool) -> Iterator[Any]:
    from pallas_kernels.ragged_paged_attention import gpu
    from pallas_kernels.ragged_paged_attention.gpu_schedule import Cut

    rounds = (0, 2, 4, 8) if decode_only else (0, 4)
    for pairs, stages, each in itertools.product((1, 2), (1, 2, 3), rounds):
        splits = -(-each * gpu.NUM_SMS * pairs // layer.kv_heads)
        short = Cut(pairs=pairs, stages=stages, splits=splits, pieces=min(splits, 64) or 1)
        if decode_only:
            yield gpu.Tiling(short, Cut(warpgroups=2))
            continue
        for warpgroups, keys, long_stages in itertools.product((1, 2, 3), (64, 128), (2, 3)):
            yield gpu.Tiling(short, Cut(warpgroups=warpgroups, keys=keys, stages=long_stages))


def _triton_candidates(layer: LayerShape, decode_only: bool) -> Iterator[Any]:
    from pallas_kernels.ragged_paged_attention import triton
    from pallas_kernels.ragged_paged_attention.triton import Cut, Tiling

    rows = max(16, 1 << (layer.heads // layer.kv_heads - 1).bit_length())
    for keys, warps, stages, each in itertools.product((32, 64, 128), (4, 8), (2, 3), (0, 4)):
        splits = -(-each * triton.NUM_SMS // layer.kv_heads)
        short = Cut(min(rows, 64), keys, splits, min(splits, 64) or 1, warps, stages)
        if decode_only:
            yield Tiling(short, Cut(64))
            continue
        for long_rows, long_warps in ((64, 4), (128, 4), (128, 8)):
            yield Tiling(short, Cut(long_rows, keys, warps=long_warps, stages=stages))


def _latent_gpu_candidates(decode_only: bool) -> Iterator[Any]:
    from pallas_kernels.mla_ragged_paged_attention.gpu import Cut, Tiling
    from pallas_kernels.ragged_paged_attention import gpu

    rounds = (0, 1, 2, 4, 8) if decode_only else (0, 4)
    for stages, each in itertools.product((1, 2), rounds):
        splits = each * gpu.NUM_SMS
        yield Tiling(Cut(stages, splits, min(splits, 64) or 1), Cut(stages))


def _latent_triton_candidates(decode_only: bool) -> Iterator[Any]:
    from pallas_kernels.ragged_paged_attention import triton
    from pallas_kernels.ragged_paged_attention.triton import Cut, Tiling

    for rows, keys, warps, stages, each in itertools.product((16, 32), (16, 32), (4, 8), (1, 2), (0, 4)):
        splits = each * triton.NUM_SMS
        short = Cut(rows, keys, splits, min(splits, 64) or 1, warps, stages)
        yield Tiling(short, Cut(32, keys, warps=8, stages=stages) if decode_only else short)


def seconds_of(passes: Passes, repeats: int, at_least: float) -> float:
    """The median time of a pass, over repeats of so many that one repeat takes `at_least` seconds."""
    passes(1)
    start = time.perf_counter()
    passes(1)
    count = max(1, min(1000, round(at_least / max(time.perf_counter() - start, 1e-7))))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        passes(count)
        times.append((time.perf_counter() - start) / count)
    return float(np.median(times))


def tune(backend: str, layer_name: str, works: list[str], options: argparse.Namespace) -> Choice | None:
    """Times every candidate; None where there is none, or no batch fits into memory."""
    layer, dtype = LAYERS[layer_name], jnp.dtype(options.dtype)
    decode_only = WORKS[works[0]].decode_only
    tried = [None, *candidates(backend, layer, options.page_size, decode_only=decode_only)]
    if len(tried) == 1:
        return None
    totals: dict[Any, list[float]] = {}
    key = ""
    for name in works:
        work = WORKS[name]
        num_layers = layers_that_fit(layer, work, dtype)
        if num_layers < 1:
            tqdm.write(f"{layer_name}, {name}: left out, its cache does not fit")
            continue
        setting = Setting(layer, work, dtype, options.page_size, num_layers, options.seed)
        key = key_of(setting)
        setting.fill()
        times: list[float] = []
        for tiling in tqdm(tried, desc=f"{layer_name}, {name}", unit="tiling", leave=False):
            try:
                seconds = seconds_of(setting.passes(backend, tiling), options.repeats, options.at_least)
            except Exception as error:  # the compiler says in many ways that something does not fit
                tqdm.write(f"{tiling} cannot be had: {str(error).splitlines()[0][:100]}")
                seconds = float("inf")
            times.append(seconds)
        # Once more, now that nothing runs for the first time any longer.
        again = seconds_of(setting.passes(backend), options.repeats, options.at_least)
        default = times[0] = min(times[0], again)
        for tiling, seconds in zip(tried, times, strict=True):
            totals.setdefault(tiling, []).append(seconds / default)
    if not totals:
        return None
    means = {tiling: float(np.exp(np.mean(np.log(ratios)))) for tiling, ratios in totals.items()}
    best = min(means, key=lambda tiling: means[tiling])
    if means[best] > 1 - options.margin:
        best = None
    return Choice(backend, key, len(means) - 1, means[best], best)


def key_of(setting: Setting) -> str:
    """What the op looks a tiling up by."""
    decode_only, pages = setting.work.decode_only, setting.pages
    if isinstance(setting.layer, LatentShape):
        q_latent, q_rope, *_ = setting.new
        return latent_shape_key(q_latent, q_rope, pages, decode_only=decode_only)
    return tuned.shape_key(setting.new[0], pages, decode_only=decode_only)


def write_table(path: Path, choices: list[Choice]) -> None:
    """Adds what was found to a table; a shape that is best without leaves it."""
    table: tuned.Table = json.loads(path.read_text()) if path.exists() else {}
    for choice in choices:
        shapes = table.setdefault(choice.backend, {})
        shapes.pop(choice.shape, None)
        if choice.tiling is not None:
            shapes[choice.shape] = dataclasses.asdict(choice.tiling)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune", description=__doc__.split("\n")[0])
    several: Any = {"action": "extend", "nargs": "+", "metavar": "NAME"}
    parser.add_argument("--layer", choices=sorted(LAYERS), help="default: all", **several)
    parser.add_argument("--work", choices=sorted(WORKS), help="default: nine of both kinds", **several)
    parser.add_argument("--backend", choices=[b for b in BACKENDS if b not in WITHOUT_TILES])
    parser.add_argument("--dtype", help="default: float32 on CPU, else bfloat16")
    parser.add_argument("--page-size", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--at-least", type=float, default=0.02, help="seconds of calls in a repeat")
    parser.add_argument("--margin", type=float, default=0.03, help="what a tiling must gain to be kept")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="default: the package's table of this kind of device")
    add_output_arguments(parser, plot=False)
    options = parser.parse_args(arguments)
    options.dtype = options.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    out = options.out or tuned.table_path(jax.devices()[0].device_kind)
    works = options.work or [*DECODES, *MIXED]
    choices: list[Choice] = []
    for layer in options.layer or LAYERS:
        here = backends_here(LAYERS[layer], jnp.dtype(options.dtype))
        backend = options.backend or next(b for b in reversed(here) if b not in WITHOUT_TILES)
        for decode_only in (True, False):
            own = [name for name in works if WORKS[name].decode_only == decode_only]
            choice = tune(backend, layer, own, options) if own else None
            if choice is not None:
                choices.append(choice)
                write_table(out, choices)  # what was found so far outlives an interruption
    rows: list[list[object]] = [
        [
            c.backend,
            c.shape,
            c.num_candidates,
            f"{c.over_default:.2f}",
            "the default" if c.tiling is None else c.tiling,
        ]
        for c in choices
    ]
    print_table(str(out), ["backend", "shape", "tried", "of the default's time", "best"], rows)
    write_json(options.json, choices)


if __name__ == "__main__":
    main()
