"""Times the attention ops: every backend that the machine has, over the named shapes, against the ceilings.

    python -m benchmarks.kernels --layer llama-3.1-8b --plot roofline.png

Every call takes another layer of a cache whose pages stand in random order, as in a model. Bytes are those
of what some query sees of the cache, of the queries, the output and the new tokens; the floor is the larger
of bytes over the measured copy bandwidth and FLOPs over the measured matrix products. `attention_peers.py`
says what the peers are.

Whatever runs at a shape takes turns, and a comparison is the median over turns, each with its neighbour:
what disturbs the machine disturbs both.
"""

from __future__ import annotations

import argparse
import itertools
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from benchmarks.attention import LAYERS, Dense, Passes, Setting, Shape, backends_here, layers_that_fit
from benchmarks.attention_peers import PEERS, prepare_peer
from benchmarks.machine import Machine, measure
from benchmarks.report import add_output_arguments, figure, print_table, save, write_json
from pallas_kernels.ragged_paged_attention import BACKENDS
from pallas_kernels.ragged_paged_attention.shapes import WORKS, Work

# At least so many turns where two are within a factor of each other, and at most so many.
CLOSE, FEWEST_TURNS, MOST_TURNS = 1.3, 3, 15


@dataclass(frozen=True, slots=True)
class Timing:
    """One implementation at one shape.

    Attributes:
        seconds: of one call, the median over turns.
        num_bytes, flops: that a call cannot do without.
        floor: seconds below which the machine cannot be.
        times_as_fast_as: of each peer that ran, its time over this one's; empty for a peer.
    """

    layer: str
    work: str
    implementation: str
    seconds: float
    num_bytes: int
    flops: int
    floor: float
    times_as_fast_as: dict[str, float]


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A shape, or one implementation of it, that was not timed."""

    layer: str
    work: str
    why: str


def take_turns(
    passes: Mapping[str, Passes], budget: float, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of a pass of each, turn by turn, within about `budget` seconds.

    A turn of what is quick is of many passes. Where two are close they have no fewer turns than
    `FEWEST_TURNS`, whatever they take; what is far behind and would outlast the budget has had its only one.
    """

    def seconds(run: Passes, count: int) -> float:
        start = clock()
        run(count)
        return (clock() - start) / count

    once = {name: seconds(run, 1) for name, run in passes.items()}
    late = {n: [each] for n, each in once.items() if each > max(budget, 2 * min(once.values()))}
    passes = {name: run for name, run in passes.items() if name not in late}
    # The first is of memory that was never touched; what is long is long the second time, too.
    once = {n: seconds(run, 1) if once[n] < budget / 4 else once[n] for n, run in passes.items()}
    share = budget / (FEWEST_TURNS * len(passes))
    counts = {name: max(1, min(1000, round(share / max(each, 1e-7)))) for name, each in once.items()}
    turn = sum(once[name] * count for name, count in counts.items())
    fastest, *others = sorted(once.values())
    fewest = FEWEST_TURNS if others and others[0] < CLOSE * fastest else 1
    times: dict[str, list[float]] = {name: [] for name in passes}
    for index in range(max(fewest, min(MOST_TURNS, int(budget / turn)))):
        # One after the other and back, so that who comes first is not always the same.
        for name in list(passes)[:: 1 if index % 2 else -1]:
            times[name].append(seconds(passes[name], counts[name]))
    return times | late


def compare(others: list[float], own: list[float]) -> float:
    """How many times as fast: the median over turns, where both had as many."""
    if len(others) == len(own):
        return float(np.median(np.divide(others, own)))
    return float(np.median(others) / np.median(own))


def run(options: argparse.Namespace, machine: Machine) -> Iterator[Timing | LeftOut]:
    """Times what was asked for; what does not fit or would take too long is said."""
    dtype = jnp.dtype(options.dtype or ("float32" if machine.platform == "cpu" else "bfloat16"))
    peers = ("dense",) if machine.platform == "cpu" else PEERS
    for layer_name in (bar := tqdm(options.layer, unit="layer", mininterval=1)):
        bar.set_description(layer_name)
        layer = LAYERS[layer_name]
        settings: dict[str, Setting] = {}
        for work_name in options.work:
            work = WORKS[work_name]
            num_layers, floor = layers_that_fit(layer, work, dtype), floor_of(machine, layer, work, dtype)
            if num_layers < 1:
                size = layer.kv_bytes_per_token(dtype.itemsize) * sum(map(sum, work.sequences))
                yield LeftOut(layer_name, work_name, f"its cache of {size / 1e9:.1f} GB does not fit")
            elif floor > options.longest:
                yield LeftOut(layer_name, work_name, f"it takes {floor:.1f} s at best")
            else:
                settings[work_name] = Setting(layer, work, dtype, options.page_size, num_layers, options.seed)
        here = backends_here(layer, dtype)
        names = options.backend or [*(here[-1:] if machine.platform == "cpu" else here), *peers]
        prepared = prepare_all(settings, names)
        for work_name, setting in settings.items():
            ready: dict[str, Prepared] = {}
            for name in names:
                one = prepared[work_name, name]
                if isinstance(one, str):
                    yield LeftOut(layer_name, work_name, f"{name}: {one}")
                else:
                    ready[name] = one
            yield from time_setting(layer_name, work_name, setting, ready, machine, options.budget)


Prepared = Callable[[list[Dense]], Passes]


def prepare(setting: Setting, name: str) -> Prepared | str:
    """What an implementation runs at a setting, compiled; or why it cannot."""
    if name in PEERS:
        return prepare_peer(name, setting)
    passes = setting.passes(name)
    return lambda _: passes


def prepare_all(
    settings: Mapping[str, Setting], names: Iterable[str]
) -> dict[tuple[str, str], Prepared | str]:
    """All of a layer, before any of it is timed: compiling takes longer than timing, and shares the cores."""
    pairs = list(itertools.product(settings, names))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = pool.map(lambda pair: prepare(settings[pair[0]], pair[1]), pairs)
        return dict(zip(pairs, found, strict=True))


def time_setting(
    layer: str, work: str, setting: Setting, ready: dict[str, Prepared], machine: Machine, budget: float
) -> Iterator[Timing]:
    """Fills the operands, times what is ready, and lets the operands go."""
    setting.fill()
    parts = setting.dense() if any(name in PEERS for name in ready) else []
    times = take_turns({name: bind(parts) for name, bind in ready.items()}, budget) if ready else {}
    dtype = setting.pages.dtype
    setting.empty()
    num_bytes, flops = (
        setting.work.num_bytes(setting.layer, dtype.itemsize),
        setting.work.flops(setting.layer),
    )
    floor = floor_of(machine, setting.layer, setting.work, dtype)
    for name in ready:
        others = [peer for peer in ready if peer in PEERS and name not in PEERS]
        faster = {peer: compare(times[peer], times[name]) for peer in others}
        seconds = float(np.median(times[name])) / setting.num_layers
        yield Timing(layer, work, name, seconds, num_bytes, flops, floor, faster)


def floor_of(machine: Machine, layer: Shape, work: Work, dtype: jnp.dtype) -> float:
    """Seconds below which the machine cannot be."""
    num_bytes, flops = work.num_bytes(layer, dtype.itemsize), work.flops(layer)
    return max(num_bytes / machine.copy_bandwidth, flops / machine.flops(dtype.name))


def different(names: list[str]) -> list[str]:
    """Layers by name, less those of a shape that another one has."""
    return list({LAYERS[name]: name for name in reversed(names)}.values())[::-1]


def print_timings(timings: list[Timing], machine: Machine, title: str) -> None:
    peers = list(dict.fromkeys(peer for timing in timings for peer in timing.times_as_fast_as))
    columns = ["layer", "batch", "by", "ms", "GB/s", "of copy", "GFLOP/s", "of product", "over floor"]
    rows: list[list[object]] = []
    for timing in timings:
        bandwidth, rate = timing.num_bytes / timing.seconds, timing.flops / timing.seconds
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
                *(f"{timing.times_as_fast_as[p]:.2f}" if p in timing.times_as_fast_as else "" for p in peers),
            ]
        )
    note = f"{machine.describe()}; `vs` a peer above 1: faster"
    print_table(title, [*columns, *(f"vs {peer}" for peer in peers)], rows, note=note)


def verdicts(timings: list[Timing]) -> Iterator[str]:
    """Of each backend and peer, at which shapes the backend is the slower one."""
    pairs = dict.fromkeys((t.implementation, peer) for t in timings for peer in t.times_as_fast_as)
    for name, peer in pairs:
        ratios = {
            f"{t.layer}, {t.work}": t.times_as_fast_as[peer]
            for t in timings
            if t.implementation == name and peer in t.times_as_fast_as
        }
        slower = sorted((ratio, shape) for shape, ratio in ratios.items() if ratio < 1)
        said = f"{name} is slower than {peer} at {len(slower)} of {len(ratios)} shapes"
        yield said + "".join(f"\n  {ratio:.2f} x as fast: {shape}" for ratio, shape in slower)


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
    parser.add_argument("--layer", choices=sorted(LAYERS), help="default: all, one of those alike", **several)
    parser.add_argument("--work", choices=sorted(WORKS), help="default: all", **several)
    parser.add_argument(
        "--backend",
        choices=[*BACKENDS, *PEERS],
        help="default: all that run here; on a CPU, what users get, and dense",
        **several,
    )
    parser.add_argument("--dtype", help="default: float32 on CPU, else bfloat16")
    parser.add_argument("--page-size", type=int, default=16)
    parser.add_argument("--budget", type=float, default=0.3, help="seconds of timing that a shape has, about")
    parser.add_argument(
        "--longest", type=float, default=1.0, help="leave out what takes longer at best, in s"
    )
    parser.add_argument("--seed", type=int, default=0)
    add_output_arguments(parser)
    options = parser.parse_args(arguments)
    options.layer = options.layer or different(list(LAYERS))
    options.work = options.work or list(WORKS)
    machine = measure()
    results = list(run(options, machine))
    timings = [result for result in results if isinstance(result, Timing)]
    left_out = [result for result in results if isinstance(result, LeftOut)]
    print_timings(timings, machine, f"attention, pages of {options.page_size} tokens")
    for one in left_out:
        print(f"{one.layer}, {one.work}: left out, {one.why}")
    for verdict in verdicts(timings):
        print(verdict)
    write_json(options.json, {"machine": machine, "timings": timings, "left_out": left_out})
    if options.plot and timings:
        draw(timings, machine, options.plot)


if __name__ == "__main__":
    main()
