"""What the TPU compiler makes of the attention kernel: the cycles of its schedule beside the roofline.

    python -m benchmarks.tpu_schedules --json FILE --plot FILE

It needs libtpu (`pip install "jaxllm[compilers]"`) but no TPU, and none is measured: the kernel is compiled
for each chip, and the bundles of its final schedule are counted, one cycle each. A block of keys in the
middle of a long sequence takes the bundles that start the copies of the next block, those that lay the
block's rows apart, so many keys at a time, and the stretch of the products, once. What else the loop over
blocks holds begins and ends tiles and sequences, and is given apart. The copies take the block's bytes at the
chip's bandwidth, and fly meanwhile: whichever is longer is how long a block takes. A bundle that waits for
another unit takes longer than it is counted.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.report import add_output_arguments, figure, print_table, save, write_json

LAYERS = ("llama-3.1-8b", "llama-3.1-70b tp8", "qwen3-30b-a3b")
SEQS, CONTEXT, PAGE_SIZE = 64, 8192, 64


@dataclass(frozen=True, slots=True)
class Chip:
    """A TensorCore, by the maker's figures.

    Attributes:
        topology: as libtpu calls it.
        bandwidth: bytes/s of HBM.
        flops: of bfloat16 products.
        clock: cycles/s: the products' rate over what the matrix units do in a cycle.
    """

    topology: str
    bandwidth: float
    flops: float
    clock: float


# A v7x chip has two TensorCores, and each half of its memory's bandwidth.
CHIPS = {
    "v5e": Chip("v5e:2x2", 819e9, 197e12, 1.5e9),
    "v6e": Chip("v6e:2x2", 1638e9, 918e12, 1.75e9),
    "v7x": Chip("tpu7x:2x2x1", 3690e9, 1153.5e12, 2.2e9),
}


@dataclass(frozen=True, slots=True)
class Bundle:
    """What the core issues in one cycle.

    Attributes:
        depth: of loops that it stands in.
        begins: whether a loop's body begins here.
        slots: how many of each unit's slots it uses.
        copies: of pages from HBM that it starts.
    """

    depth: int
    begins: bool
    slots: dict[str, int]
    copies: int


@dataclass(frozen=True, slots=True)
class Schedule:
    """Cycles of the kernel for one block of keys in the middle of a sequence.

    Attributes:
        keys, block_bytes: of a block.
        fetch, separate, products: cycles that compute it: starting copies, laying rows apart, and the rest.
        control: bundles that begin and end tiles and sequences, all of them together.
        copy: cycles that its bytes take from HBM.
        spills: vector registers written to memory in a block, for want of room.
        estimated_bytes, estimated_flops: of the whole call, as the compiler has it.
    """

    chip: str
    layer: str
    keys: int
    block_bytes: int
    fetch: int
    separate: int
    products: int
    control: int
    copy: float
    spills: int
    estimated_bytes: float
    estimated_flops: float

    @property
    def compute(self) -> int:
        return self.fetch + self.separate + self.products

    @property
    def of_roofline(self) -> float:
        """Of the bandwidth, were a block to take as long as the longer of its copies and its bundles."""
        return self.copy / max(self.copy, self.compute)


_BUNDLE = re.compile(r"^\s*(0x[0-9a-f]+|\d+)\s+(LB|LH|LE|PB|PF|CT)?\s*:\s*((?:>\s*)*)\{")


def read_bundles(bundles: str, utilization: str) -> list[Bundle]:
    """The final schedule, of the two files of libtpu's dump that hold it."""
    _, names, _, *rows = utilization.splitlines()
    units = [name.strip() for name in names.split(",")]
    used = [dict(zip(units, map(int, row.split()), strict=True)) for row in rows if row[:1].isdigit()]
    found: list[tuple[int, bool, list[str]]] = []
    for line in bundles.splitlines():
        if match := _BUNDLE.match(line):
            found.append((match[3].count(">"), match[2] == "LB", [line]))
        elif found:
            found[-1][2].append(line)
    return [
        Bundle(depth, begins, slots, sum(line.count("dma.hbm_to_vmem") for line in lines))
        for (depth, begins, lines), slots in zip(found, used, strict=True)
    ]


def cycles_of_a_block(bundles: list[Bundle], pages: int, together: int, strips: int) -> dict[str, int]:
    """Cycles by kind (see `Schedule`).

    Args:
        pages: of a block, whose copies are started so many `together`.
        strips: of keys, which are laid apart one after the other.
    """
    [*_, first] = (i for i, bundle in enumerate(bundles) if bundle.begins and bundle.depth == 1)
    # Branches, and the loops within, part what the loop itself holds into stretches.
    stretches: list[list[Bundle]] = [[]]
    inner: list[list[Bundle]] = []
    for bundle in bundles[first:]:
        if bundle.depth >= 2 and bundle.begins:
            inner.append([])
        if bundle.depth >= 2:
            inner[-1].append(bundle)
        elif bundle.depth == 1:
            stretches[-1].append(bundle)
        if bundle.depth != 1 and stretches[-1]:
            stretches.append([])
    products = max(stretches, key=lambda stretch: sum(bundle.slots["MXU"] for bundle in stretch))
    # Of a block that is not whole they are started one by one, in a loop of their own.
    fetch = max((*stretches, *inner), key=lambda part: sum(bundle.copies for bundle in part))
    # So are rows, unless all keys of a block are laid apart at once.
    others = inner if strips > 1 else [part for part in stretches if part is not products]
    separate = max(others, key=lambda part: sum(bundle.slots["VALU"] for bundle in part))
    begins_and_ends = [
        part for part in stretches if all(part is not one for one in (products, fetch, separate))
    ]
    spills = [sum(bundle.slots["VSTORE:SPILL"] for bundle in part) for part in (products, separate)]
    return {
        "fetch": pages // together * len(fetch),
        "separate": strips * len(separate),
        "products": len(products),
        "control": sum(map(len, begins_and_ends)),
        "spills": spills[0] + strips * spills[1],
    }


def compile_decodes(chip: Chip, layer: Any) -> tuple[Any, Any]:
    """A step's attention of one layer over decodes, compiled; and the kernel's tiling."""
    import functools

    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies
    from jax.experimental.layout import Format, Layout
    from jax.sharding import SingleDeviceSharding

    from pallas_kernels.ragged_paged_attention import cache_rows, tpu
    from pallas_kernels.ragged_paged_attention.options import AttentionOptions
    from pallas_kernels.ragged_paged_attention.tpu_work import Tiling

    devices = topologies.get_topology_desc(platform="tpu", topology_name=chip.topology).devices
    here = SingleDeviceSharding(devices[0])
    kv_heads, head_dim = layer.kv_heads, layer.head_dim

    def array(*shape: int, dtype: Any = jnp.int32, sharding: Any = here) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    half = functools.partial(array, dtype=jnp.bfloat16)
    q, new = half(SEQS, layer.heads, head_dim), half(SEQS, kv_heads, head_dim)
    rows = cache_rows("tpu", kv_heads, head_dim)
    held = half(2, 4096, PAGE_SIZE, *rows, sharding=Format(Layout(tuple(range(5))), here))
    table = array(SEQS, CONTEXT // PAGE_SIZE)
    options = AttentionOptions(scale=head_dim**-0.5, decode_only=True)

    def attend(q: Any, k: Any, v: Any, held: Any, table: Any, lens: Any, starts: Any) -> Any:
        pages = held.reshape(*held.shape[:3], 2 * kv_heads, head_dim)
        out, pages, _ = tpu.attend(q, k, v, pages, 1, table, lens, starts, options)
        return out, pages.reshape(held.shape)

    jitted = jax.jit(attend, donate_argnums=3, out_shardings=(here, held.format))
    compiled = jitted.lower(q, new, new, held, table, array(SEQS), array(SEQS + 1)).compile()
    view = jax.ShapeDtypeStruct((2, 4096, PAGE_SIZE, 2 * kv_heads, head_dim), jnp.bfloat16)
    return compiled, Tiling.choose(q, view, table, True)  # type: ignore[arg-type]


def schedules(dump: Path) -> Iterator[Schedule]:
    """Compiles the kernel for every chip and layer, and counts what libtpu writes to the folder."""
    from pallas_kernels.ragged_paged_attention.shapes import LAYERS as SHAPES
    from pallas_kernels.ragged_paged_attention.tpu_kernel import FETCHED
    from pallas_kernels.ragged_paged_attention.tpu_rows import keys_separated

    for chip_name, chip in CHIPS.items():
        for name in LAYERS:
            before = set(dump.iterdir())
            compiled, tiling = compile_decodes(chip, SHAPES[name])
            written = [path for path in dump.iterdir() if path not in before and "ragged_paged" in path.name]

            def of(ending: str, written: list[Path] = written) -> str:
                [path] = (one for one in written if re.fullmatch(rf".*-\d+-{ending}\.txt", one.name))
                return path.read_text()

            bundles = read_bundles(of("final_bundles"), of("final_hlo-static-per-bundle-utilization"))
            pages = tiling.keys // PAGE_SIZE
            strips = tiling.keys // keys_separated(2 * SHAPES[name].kv_heads, tiling.keys)
            cycles = cycles_of_a_block(bundles, pages, math.gcd(pages, FETCHED), strips)
            block_bytes = tiling.keys * SHAPES[name].kv_bytes_per_token(2)
            cost = compiled.cost_analysis() or {}
            yield Schedule(
                chip=chip_name,
                layer=name,
                keys=tiling.keys,
                block_bytes=block_bytes,
                copy=block_bytes / chip.bandwidth * chip.clock,
                estimated_bytes=float(cost.get("bytes accessed", 0)),
                estimated_flops=float(cost.get("flops", 0)),
                **cycles,
            )
            for path in set(dump.iterdir()) - before:
                path.unlink()


def draw(found: list[Schedule], path: Path) -> None:
    """For each chip and layer a bar of the copies, and below it one of what is computed meanwhile."""
    picture, axes = figure(9.0, 0.75 * len(found) + 1.2)
    colours = {"fetch": "#8fb8de", "separate": "#e8a33d", "products": "#c8553d"}
    for row, one in enumerate(found):
        axes.barh(row - 0.19, one.copy, 0.34, color="#4a6fa5", label="" if row else "copies from HBM")
        left = 0
        for part, label in (
            ("fetch", "starting copies"),
            ("separate", "laying rows apart"),
            ("products", "products and softmax"),
        ):
            width = getattr(one, part)
            axes.barh(row + 0.19, width, 0.34, left=left, color=colours[part], label="" if row else label)
            left += width
    axes.set_yticks(range(len(found)), [f"{one.chip}, {one.layer}" for one in found])
    axes.invert_yaxis()
    axes.set_xlabel("cycles of one block of keys, decodes")
    axes.legend(frameon=False, loc="lower right")
    save(picture, path)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tpu_schedules", description=__doc__.split("\n")[0]
    )
    add_output_arguments(parser)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        # Read by libtpu when it is loaded; so that it looks for no chip, and writes down its schedules.
        os.environ.update(
            JAX_PLATFORMS="cpu",
            TPU_SKIP_MDS_QUERY="1",
            TPU_ACCELERATOR_TYPE="v5litepod-8",
            TPU_WORKER_HOSTNAMES="localhost",
            ALLOW_MULTIPLE_LIBTPU_LOAD="1",
            LIBTPU_INIT_ARGS=f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true",
        )
        found = []
        for one in schedules(Path(folder)):
            print(one, file=sys.stderr, flush=True)
            found.append(one)
    rows: list[list[object]] = [
        [
            f"{one.chip}, {one.layer}",
            one.keys,
            f"{one.block_bytes / 2**20:.2f}",
            f"{one.copy:.0f}",
            one.fetch,
            one.separate,
            one.products,
            one.control,
            one.spills,
            f"{one.of_roofline:.0%}",
        ]
        for one in found
    ]
    columns = [
        "",
        "keys",
        "MiB",
        "copy",
        "start",
        "lay apart",
        "products",
        "control",
        "spills",
        "of roofline",
    ]
    print_table(
        "Decode attention: cycles of a block of keys", columns, rows, "counted from compiled schedules"
    )
    command = " ".join(["python -m benchmarks.tpu_schedules", *sys.argv[1:]])
    write_json(options.json, {"command": command, "chips": CHIPS, "schedules": found})
    if options.plot:
        draw(found, options.plot)


if __name__ == "__main__":
    main()
