"""What each device computes, reads and sends in a step as the mesh grows, counted in compiled steps.

    python -m benchmarks.scaling --shape llama-3.1-70b --json scaling.json --plot scaling.png

Compiles the step for simulated devices, of which no clock could say anything, and counts in the module:
products, collectives with the trips of their loops, weights on a device. No weights are made. Then says
what that promises on real chips (`weak_scaling.py` has the model, and all that it assumes). A model of
experts is counted with a part of each on every device, and with whole ones on the devices of all replicas.

Counted in float32, which a CPU computes in; bytes are of `--dtype`, in which as many numbers move.
"""

from __future__ import annotations

import argparse
import functools
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.cost import DTYPE_BYTES
from benchmarks.hlo import Work, parse, work
from benchmarks.report import add_output_arguments, print_table, save, write_json
from benchmarks.shapes import SHAPES
from benchmarks.weak_scaling import Counts, Point, fitting, points, takeover
from jaxllm.scheduling.simulator.devices import DEVICES, INTERCONNECTS

if TYPE_CHECKING:
    from jax.stages import Compiled

    from jaxllm.execution.batch import StepShape
    from jaxllm.models.config import ModelConfig
    from jaxllm.models.decoder import Decoder

PAGE_SIZE, NUM_PAGES = 64, 64
DEVICE_NAMES = ("v5e", "v6e", "h200")
COLOURS = {
    "tensor": "tab:red",
    "tensor x data": "tab:blue",
    "tensor x pipe": "tab:green",
    "experts over data x tensor": "tab:purple",
}


def compile_step(model: ModelConfig, data: int, tensor: int, shape: StepShape) -> tuple[Compiled, Decoder]:
    """The step of an accelerator's form, for so many of this process's devices; replicas share the experts.

    Raises:
        ShardingError: the model cannot be split so, or there are fewer devices.
    """
    import jax.numpy as jnp

    from jaxllm.execution.abstract import (
        abstract_cache,
        abstract_parameters,
        abstract_state,
        lower_step,
    )
    from jaxllm.execution.sampler import SamplerState
    from jaxllm.execution.step import step
    from jaxllm.models.blocks import DecoderForm
    from jaxllm.models.decoder import Decoder
    from sharding import make_mesh

    mesh = None if data * tensor == 1 else make_mesh(data=data, tensor=tensor)
    form = DecoderForm(jnp.dtype("float32"), False, True, "xla", mesh, expert_parallel=data > 1)
    decoder = Decoder(model, form)
    vocabulary = decoder.fitted.vocab_size
    lowered = lower_step(
        functools.partial(step, decoder=decoder, shape=shape, num_logprobs=1, logprobs_mode="raw_logprobs"),
        decoder,
        abstract_parameters(decoder),
        abstract_cache(decoder, NUM_PAGES, PAGE_SIZE),
        abstract_state(functools.partial(SamplerState.create, shape.num_seqs, vocabulary, data), mesh),
        shape,
    )
    return lowered.compile(), decoder


def held(compiled: Compiled, decoder: Decoder) -> dict[str, int]:
    """Numbers of each parameter, and of the cache per position ("cache"), that one device has."""
    import math

    from jaxllm.execution.abstract import abstract_cache, abstract_parameters

    shardings, cache_sharding, *_ = compiled.input_shardings[0]
    parameters = abstract_parameters(decoder)
    sizes = {n: math.prod(shardings[n].shard_shape(array.shape)) for n, array in parameters.items()}
    cache = abstract_cache(decoder, NUM_PAGES, PAGE_SIZE)
    sizes["cache"] = math.prod(cache_sharding.shard_shape(cache.shape)) // (NUM_PAGES * PAGE_SIZE)
    return sizes


def count(model: ModelConfig, kind: str, data: int, tensor: int, options: argparse.Namespace) -> Counts:
    """Compiles a step of every chip's share of requests on so many of them, and counts."""
    from jaxllm.execution.batch import StepShape
    from jaxllm.simulate import figures_of

    decodes, context = kind == "decode", options.context
    num_tokens = tensor * (options.seqs_per_chip if decodes else options.tokens_per_chip)
    num_seqs = num_tokens if decodes else -(-num_tokens // context)
    shape = StepShape(num_tokens, num_seqs, -(-context // PAGE_SIZE), decodes)
    compiled, decoder = compile_step(model, data, tensor, shape)
    done: Work = work(parse(compiled.as_text() or ""))
    sizes, width = held(compiled, decoder), DTYPE_BYTES[options.dtype]
    cache = sizes.pop("cache")
    looked_up = 0 if model.tie_word_embeddings else sizes["embed.weight"]
    # A query sees all of the context, those of a prompt half of it on average.
    pairs = num_tokens * (context if decodes else context // 2)
    figures = figures_of(decoder.fitted, options.dtype)
    read, rows = sum(sizes.values()) - looked_up, 0
    if model.moe is not None:
        experts = sum(size for name, size in sizes.items() if ".experts." in name)
        read -= experts - round(experts * model.moe.experts_read(data * num_tokens) / model.moe.num_experts)
        # As many of a device's own, with a part of each of their experts, as of all with whole ones.
        rows = num_tokens * model.moe.experts_per_token
    return Counts(
        kind=kind,
        tensor=tensor,
        data=data,
        num_tokens=num_tokens,
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        dtype_bytes=width,
        product_flops=done.flops,
        expert_flops=2 * rows * model.expert_parameters // tensor,
        attention_flops=figures.pair_flops * pairs // tensor,
        weight_bytes=sum(sizes.values()) * width,
        read_bytes=read * width,
        kv_bytes=num_seqs * context * cache * width,
        all_reduces=done.collectives["all-reduce"],
        all_reduce_bytes=done.elements["all-reduce"] * width,
        all_to_alls=done.collectives["all-to-all"],
        all_to_all_bytes=done.elements["all-to-all"] * width,
        other_bytes=sum(
            n * width for kind, n in done.elements.items() if kind not in ("all-reduce", "all-to-all")
        ),
    )


def print_counts(rows: list[Counts], title: str) -> None:
    """Of each compiled step, per device."""
    columns = (
        "step",
        "mesh",
        "tokens",
        "product GFLOP",
        "of experts",
        "attention",
        "weights, GB",
        "KV read, GB",
    )
    table: list[list[object]] = [
        [
            one.kind,
            f"{one.data} x {one.tensor}",
            one.num_tokens,
            f"{one.product_flops / 1e9:,.1f}",
            f"{one.expert_flops / 1e9:,.1f}",
            f"{one.attention_flops / 1e9:,.1f}",
            f"{one.weight_bytes / 1e9:.2f}",
            f"{one.kv_bytes / 1e9:.2f}",
            one.all_reduces,
            f"{one.all_reduce_bytes / 1e6:,.1f}",
            one.all_to_alls,
            f"{one.all_to_all_bytes / 1e6:,.1f}",
            f"{one.other_bytes / 1e6:.2f}",
        ]
        for one in rows
    ]
    note = (
        "mesh: data x tensor; replicas, where there are several, share the experts. tokens: of each replica."
    )
    collectives = ("all-reduces", "of MB", "all-to-alls", "of MB", "other, MB")
    print_table(title, [*columns, *collectives], table, note=note)


def print_points(all_points: list[Point], title: str) -> None:
    """What each plan keeps of the throughput of a chip, and where summing takes longer than computing."""
    rows: list[list[object]] = []
    groups: dict[tuple[str, str], list[Point]] = {}
    for point in all_points:
        groups.setdefault((point.kind, point.device), []).append(point)
    for (kind, device), own in groups.items():
        least = own[0]
        at = takeover(own)
        for plan in dict.fromkeys(point.plan for point in own):
            last = [point for point in own if point.plan == plan][-1]
            rows.append(
                [
                    f"{kind}, {device}",
                    plan,
                    f"{last.data} x {last.pipe} x {last.tensor}",
                    f"{least.tokens_per_chip:,.0f}",
                    f"{last.tokens_per_chip:,.0f}",
                    f"{last.tokens_per_chip / least.tokens_per_chip:.0%}",
                    f"{1e3 * last.seconds:.2f}",
                    f"{last.all_reduce / last.seconds:.0%}",
                    f"{last.exchange / last.seconds:.0%}",
                    f"from {at} on" if plan == "tensor" and at else "",
                ]
            )
    columns = [
        "step",
        "plan",
        "largest mesh",
        "tok/s a chip, least",
        "there",
        "kept",
        "ms",
        "summing",
        "exchange",
    ]
    note = "mesh: data x pipe x tensor. least: the smallest mesh that holds the model."
    print_table(title, [*columns, "takes over"], rows, note=note)


def draw(all_points: list[Point], title: str, path: Path) -> None:
    """A panel for each device and kind of step: tokens a second and chip over chips, for each plan."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    kinds = list(dict.fromkeys(point.kind for point in all_points))
    devices = list(dict.fromkeys(point.device for point in all_points))
    size = (4 * len(devices), 3.2 * len(kinds))
    picture, grid = pyplot.subplots(
        len(kinds), len(devices), figsize=size, sharex=True, squeeze=False, layout="constrained"
    )
    for row, kind in zip(grid, kinds, strict=True):
        for axes, device in zip(row, devices, strict=True):
            own = [point for point in all_points if (point.kind, point.device) == (kind, device)]
            highest = 1.08 * max(point.tokens_per_chip for point in own)
            for plan, colour in COLOURS.items():
                if not (line := [point for point in own if point.plan == plan]):
                    continue
                xs, ys = [p.chips for p in line], [p.tokens_per_chip for p in line]
                axes.plot(xs, ys, marker="o", markersize=4, color=colour, label=plan)
            if at := takeover(own):
                axes.axvline(at, color=COLOURS["tensor"], linestyle=":", linewidth=1)
                axes.annotate(
                    " summing\n takes longer", (at, 0.03), xycoords=("data", "axes fraction"), fontsize=8
                )
            axes.set(xscale="log", xlim=(0.9, 300), ylim=(0, highest), title=f"{kind}, {device}")
            axes.set_xticks([1, 4, 16, 64, 256], ["1", "4", "16", "64", "256"])
            axes.spines[["top", "right"]].set_visible(False)
    for axes in grid[-1]:
        axes.set_xlabel("chips")
    for axes in grid[:, 0]:
        axes.set_ylabel("tokens/s a chip")
    grid[0][-1].legend(frameon=False, fontsize=8)
    picture.suptitle(title)
    save(picture, path)
    pyplot.close(picture)


def meshes_of(model: ModelConfig, options: argparse.Namespace) -> list[tuple[int, int]]:
    """(data, tensor) of every mesh that is counted; replicas, where there are several, share the experts."""
    meshes = [(1, tensor) for tensor in options.tensor]
    if model.moe is not None:
        tensor = options.replica_tensor
        meshes += [
            (chips // tensor, tensor)
            for chips in options.experts_over
            if chips > tensor and chips % tensor == 0 and model.moe.num_experts % chips == 0
        ]
    return meshes


def _sizes(text: str) -> list[int]:
    return sorted({int(size) for size in text.split(",")})


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=list(SHAPES), default="llama-3.1-70b")
    parser.add_argument("--tensor", type=_sizes, default=[1, 2, 4, 8, 16, 32, 64], metavar="N,N,...")
    parser.add_argument("--dtype", choices=list(DTYPE_BYTES), default="bfloat16", help="of weights and cache")
    parser.add_argument(
        "--seqs-per-chip", type=int, default=2, help="requests that each chip brings to a decode"
    )
    parser.add_argument(
        "--tokens-per-chip", type=int, default=256, help="prompt tokens it brings to a prefill"
    )
    parser.add_argument("--context", type=int, default=2048, help="tokens of a request")
    parser.add_argument(
        "--experts-over",
        type=_sizes,
        default=[2, 4, 8, 16, 32, 64, 128, 256],
        metavar="N,N,...",
        help="devices of all replicas that share the experts; only numbers that divide these are counted",
    )
    parser.add_argument(
        "--replica-tensor", type=int, default=1, metavar="N", help="devices of such a replica"
    )
    parser.add_argument("--chips", type=int, default=256, help="of the largest mesh")
    add_output_arguments(parser)
    options = parser.parse_args(arguments)
    os.environ["JAX_PLATFORMS"] = "cpu"
    from jaxllm.models.families import translate_config

    model = translate_config(SHAPES[options.shape])
    meshes = meshes_of(model, options)
    # Before JAX asks for devices: it simulates as many as this says.
    flag = f"--xla_force_host_platform_device_count={max(data * tensor for data, tensor in meshes)}"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}"
    counts = [count(model, kind, *mesh, options) for kind in ("decode", "prefill") for mesh in meshes]
    print_counts(
        counts, f"{options.shape}, {options.dtype}: a step, per device, counted in the compiled module"
    )
    promised: list[Point] = []
    for kind in ("decode", "prefill"):
        for name in DEVICE_NAMES:
            device, links = DEVICES[name], INTERCONNECTS[name]
            # The same meshes for both kinds of step: what decodes hold is what must fit.
            sizes = fitting([one for one in counts if one.kind == "decode"], device, links)
            own = [one for one in counts if one.kind == kind and (one.data, one.tensor) in sizes]
            promised += points(own, device, links, options.chips)
    title = f"{options.shape}, {options.dtype}: weak scaling to {options.chips} chips"
    print_points(promised, title)
    settings: dict[str, Any] = {k: v for k, v in vars(options).items() if k not in ("json", "plot")}
    write_json(options.json, {"settings": settings, "counts": counts, "points": promised})
    if options.plot:
        draw(promised, f"{title}, {options.seqs_per_chip} requests a chip", options.plot)


if __name__ == "__main__":
    main()
