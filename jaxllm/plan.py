"""`python -m jaxllm.plan MODEL`: what each device would hold of a model, before there is any device.

    python -m jaxllm.plan Qwen/Qwen3-32B --tensor-parallel-size 8 --device v6e

Reads `config.json` and nothing else: a file, a directory, or a name on the hub. Prints each array with its
global and per-device shape and bytes, then what is left for the KV cache and how many tokens that holds.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from jaxllm.config import EngineConfig
from jaxllm.errors import ConfigError, JaxLLMError
from jaxllm.execution.layout import Layout, lay_out
from jaxllm.models.families import translate_config
from jaxllm.models.hub import read_config_of
from jaxllm.models.loader import DTYPES
from jaxllm.scheduling.simulator import DEVICES

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plan(options: argparse.Namespace) -> Layout:
    """The layout that the command line asks for.

    Raises:
        ConfigError: the mesh cannot split the model, there are more stages than layers, or no experts.
        JaxLLMError: the model cannot be read, or is of a family that is not served.
    """
    model = translate_config(read_config_of(options.model, options.revision), options.hf_overrides)
    if options.pipeline_parallel_size > model.num_layers:
        raise ConfigError(
            f"pipeline_parallel_size={options.pipeline_parallel_size} is more than the {model.num_layers} "
            "layers of the model; give at most so many stages.",
            param="pipeline_parallel_size",
        )
    if options.enable_expert_parallel and model.moe is None:
        raise ConfigError(
            f"enable_expert_parallel, and {model.architecture} has no experts; leave it out.",
            param="enable_expert_parallel",
        )
    dtype = model.dtype if options.dtype == "auto" else options.dtype
    config = EngineConfig(
        dtype=dtype,
        max_model_len=options.max_model_len or model.max_position_embeddings,
        max_num_seqs=options.max_num_seqs,
        max_num_batched_tokens=options.max_num_batched_tokens,
        block_size=options.block_size,
        attention_backend="tpu" if options.device.startswith("v") else None,  # v5e, v6e, ... are TPUs
        gpu_memory_utilization=options.gpu_memory_utilization,
        data_parallel_size=options.data_parallel_size,
        enable_expert_parallel=options.enable_expert_parallel,
    )
    return lay_out(
        config,
        model,
        tensor=options.tensor_parallel_size,
        pipe=options.pipeline_parallel_size,
        device_memory=DEVICES[options.device].memory,
    )


def as_dict(layout: Layout) -> dict[str, Any]:
    """All of a layout, for `--json`."""
    arrays = [
        dataclasses.asdict(array) | {"bytes": array.num_bytes, "device_bytes": array.device_bytes}
        for array in layout.arrays
    ]
    return {
        "architecture": layout.model.architecture,
        "mesh": {"data": layout.data, "pipe": layout.pipe, "tensor": layout.tensor},
        "stages": [[layout.layers_of(s).start, layout.layers_of(s).stop] for s in range(layout.pipe)],
        "kv_heads": layout.model.num_kv_heads,
        "kv_heads_with_copies": layout.fitted.num_kv_heads,
        "vocabulary": layout.model.vocab_size,
        "vocabulary_filled_up": layout.fitted.vocab_size,
        "arrays": arrays,
        "weight_bytes": layout.num_bytes,
        "empty_bytes": layout.empty_bytes,
        "per_device": {
            "usable_bytes": layout.memory,
            "weight_bytes": layout.device_bytes,
            "step_bytes": layout.step_bytes,
            "kv_cache_bytes": layout.cache_bytes,
            "page_bytes": layout.page_bytes,
        },
        "kv_cache_tokens": layout.num_tokens,
        "max_model_len": layout.max_model_len,
        "concurrency": layout.concurrency,
    }


def print_layout(layout: Layout, title: str) -> None:
    """The table of arrays, and what comes to a device."""
    table = Table(title=title, title_justify="left")
    for name in ("array", "shape", "split over", "per device", "bytes", "per device"):
        table.add_column(name, no_wrap=True)
    for array in layout.arrays:
        over = ", ".join(
            f"{axis} by {' x '.join(names)}"
            for axis, names in zip(array.axes, array.split, strict=True)
            if names
        )
        table.add_row(
            array.name,
            _shape(array.shape),
            over or "-",
            _shape(array.device_shape),
            _size(array.num_bytes),
            _size(array.device_bytes),
        )
    table.add_section()
    model, (rows, width) = layout.fitted, layout.cache_rows
    rows *= model.num_kv_heads
    pages = max(layout.num_pages, 0) + 1
    axes = {"pages by data": layout.data, "layers by pipe": layout.pipe, "kv_heads by tensor": layout.tensor}
    table.add_row(
        "KV cache",
        _shape((model.num_layers, pages * layout.data, layout.page_size, rows, width)),
        ", ".join(name for name, size in axes.items() if size > 1) or "-",
        _shape((len(layout.layers_of(0)), pages, layout.page_size, rows // layout.tensor, width)),
        _size(pages * layout.page_bytes * layout.data * layout.tensor * layout.pipe),
        _size(pages * layout.page_bytes),
    )
    console = Console()
    (console if console.is_terminal else Console(width=180)).print(table)
    print(f"weights      {_size(layout.device_bytes)} a device, {_size(layout.num_bytes)} in all")
    print(f"a step       {_size(layout.step_bytes)} a device at most (estimate)")
    print(f"KV cache     {_size(max(layout.cache_bytes, 0))} of {_size(layout.memory)} usable a device")
    each = f", in each of {layout.data} replicas" if layout.data > 1 else ""
    pages_held = f"{max(layout.num_pages, 0):,} pages of {layout.page_size}"
    print(f"tokens       {layout.num_tokens:,} in {pages_held}{each}")
    print(f"concurrency  {layout.concurrency:.2f} requests of {layout.max_model_len:,} tokens{each}")
    if layout.fitted.num_kv_heads > layout.model.num_kv_heads:
        copies = layout.fitted.num_kv_heads // layout.model.num_kv_heads
        print(f"note         each of {layout.model.num_kv_heads} KV heads is kept {copies} times")
    if layout.empty_bytes:
        all_stages = f"{layout.pipe} x {_size(layout.device_bytes)}"
        print(
            "note         every stage has room for as many layers of a kind as one of them has at most: "
            f"{_size(layout.empty_bytes)} of {all_stages} stay empty"
        )


def check_memory(layout: Layout, device: str) -> None:
    """Refuses a layout that does not fit.

    Raises:
        ConfigError: weights and a step leave no room for one request of max_model_len tokens.
    """
    if layout.concurrency < 1:
        raise ConfigError(
            f"a {device} has {_size(layout.memory)} to use; weights take {_size(layout.device_bytes)}, a "
            f"step {_size(layout.step_bytes)}, and the rest holds {layout.num_tokens:,} tokens, less than "
            f"max_model_len={layout.max_model_len:,}. Raise --tensor-parallel-size, or lower --max-model-len "
            "or --max-num-batched-tokens.",
            param="tensor_parallel_size",
        )


def draw(layout: Layout, title: str) -> Figure:
    """The mesh and who holds what, and how a device's memory is used."""
    from matplotlib.figure import Figure

    figure = Figure(
        figsize=(max(8.0, 1.7 * layout.tensor + 1), 2.2 + 1.3 * layout.pipe), layout="constrained"
    )
    mesh, memory = figure.subplots(2, 1, height_ratios=(1.3 * layout.pipe, 1))
    for stage in range(layout.pipe):
        for shard in range(layout.tensor):
            text = "\n".join(_held(layout, stage, shard))
            colour = f"C{shard % 10}"
            mesh.add_patch(_rectangle(shard, stage, colour, alpha=1 - 0.6 * stage / layout.pipe))
            mesh.text(shard + 0.5, stage + 0.5, text, ha="center", va="center", fontsize=8)
    mesh.set(xlim=(0, layout.tensor), ylim=(layout.pipe, 0), xlabel="tensor", ylabel="pipe", title=title)
    mesh.set_xticks([i + 0.5 for i in range(layout.tensor)], [str(i) for i in range(layout.tensor)])
    mesh.set_yticks([i + 0.5 for i in range(layout.pipe)], [str(i) for i in range(layout.pipe)])
    left = 0.0
    parts = {"weights": layout.device_bytes, "a step": layout.step_bytes, "KV cache": layout.cache_bytes}
    for name, size in parts.items():
        memory.barh(0, max(size, 0) / 2**30, left=left, label=f"{name} {_size(max(size, 0))}")
        left += max(size, 0) / 2**30
    memory.axvline(layout.memory / 2**30, color="black", linestyle=":")
    memory.set(yticks=[], xlabel="GiB of a device")
    memory.legend(ncols=3, loc="upper center", bbox_to_anchor=(0.5, 1.45), frameon=False)
    return figure


def _held(layout: Layout, stage: int, shard: int) -> Iterator[str]:
    """What a device has of everything, a line each."""
    model, tensor = layout.fitted, layout.tensor
    layers = layout.layers_of(stage)
    yield f"layers {_span(layers.start, len(layers))}"
    copies = model.num_kv_heads // layout.model.num_kv_heads
    first, last = (index // copies for index in _ends(shard, model.num_kv_heads // tensor))
    yield f"KV heads {_span(first, last - first + 1)}"
    dense = [layer for layer in layers if layer in layout.model.mlp_layers]
    is_mixed = 0 < len(dense) < len(layers)
    if dense:
        inner = _span(shard * (model.intermediate_size // tensor), model.intermediate_size // tensor)
        yield f"MLP {inner}" + (f" of {len(dense)} layers" if is_mixed else "")
    if model.moe is not None and len(dense) < len(layers):
        number, width = model.moe.num_experts, model.moe.intermediate_size
        [down] = [array for array in layout.arrays if array.name == "layers.mlp.experts.down.weight"]
        _, own, own_width, _ = down.device_shape
        # Of replicas that share the experts each device has others, in the order of the mesh.
        firsts = [0] if own == number else [(r * tensor + shard) * own for r in range(layout.data)]
        which = ", ".join(_span(first, own) for first in firsts)
        yield f"experts {which}" + (f" of {len(layers) - len(dense)} layers" if is_mixed else "")
        if own_width < width:
            yield f"of each {_span(shard * own_width, own_width)}"
    rows = model.vocab_size // (tensor * layout.pipe)
    yield f"vocab {_span((stage * tensor + shard) * rows, rows)}"


def _ends(index: int, size: int) -> tuple[int, int]:
    """The first and the last of the part with this index, of parts of a size."""
    return index * size, (index + 1) * size - 1


def _span(first: int, count: int) -> str:
    return str(first) if count == 1 else f"{first}-{first + count - 1}"


def _rectangle(x: int, y: int, colour: str, alpha: float) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((x, y), 1, 1, facecolor=colour, edgecolor="white", alpha=0.35 * alpha + 0.1)


def _shape(sizes: tuple[int, ...]) -> str:
    return " x ".join(map(str, sizes))


def _size(size: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"


def make_parser(program: str) -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog=program,
        description="What each device would hold of a model, from its config.json alone.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="config.json, a directory, or a hub name; no weights are read")
    add("--tensor-parallel-size", "-tp", type=_positive, default=1, metavar="N", help="devices to a layer")
    add("--pipeline-parallel-size", "-pp", type=_positive, default=1, metavar="N", help="stages")
    add("--data-parallel-size", "-dp", type=_positive, default=1, metavar="N", help="replicas")
    add(
        "--enable-expert-parallel",
        action="store_true",
        help="whole experts, over the devices of all replicas",
    )
    add("--device", choices=list(DEVICES), default="h200")
    add("--dtype", choices=["auto", *DTYPES], default="auto", help="of weights and cache")
    add("--revision", metavar="NAME", help="of a model on the hub")
    add("--hf-overrides", type=json.loads, default={}, metavar="JSON", help="fields of config.json")
    add("--max-model-len", type=_positive, metavar="N", help="default: the model's positions")
    add("--max-num-seqs", type=_positive, default=256, metavar="N")
    add("--max-num-batched-tokens", type=_positive, default=8192, metavar="N")
    add("--block-size", type=_positive, default=16, metavar="N")
    add("--gpu-memory-utilization", type=_fraction, default=0.92, metavar="F")
    add("--json", type=Path, metavar="FILE", help="write everything to this file")
    add("--plot", type=Path, metavar="FILE", help="draw the mesh and who holds what")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return value


def _fraction(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} must be above 0 and at most 1")
    return value


def main(argv: Sequence[str] | None = None, program: str = "python -m jaxllm.plan") -> int:
    """Runs the command line; returns the exit status."""
    parser = make_parser(program)
    options = parser.parse_args(argv)
    if not isinstance(options.hf_overrides, dict):
        parser.error("argument --hf-overrides: it must be a JSON object")
    sizes = [options.data_parallel_size, options.pipeline_parallel_size, options.tensor_parallel_size]
    axes = ["data", "pipe", "tensor"]
    if sizes[0] == 1:
        del sizes[0], axes[0]
    title = f"{options.model}: {' x '.join(map(str, sizes))} {options.device} ({' x '.join(axes)})"
    try:
        layout = plan(options)
        print_layout(layout, title)
        if options.json is not None:
            options.json.write_text(json.dumps(as_dict(layout), indent=2) + "\n")
        if options.plot is not None:
            try:
                draw(layout, title).savefig(options.plot, dpi=120)
            except ImportError as error:
                raise ConfigError(
                    f"a picture needs matplotlib ({error}): pip install 'jaxllm[plots]'"
                ) from error
        check_memory(layout, options.device)
    except (JaxLLMError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
