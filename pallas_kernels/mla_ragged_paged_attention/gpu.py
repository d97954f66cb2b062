"""The op on NVIDIA Hopper GPUs (H100, H200): a warp-specialised kernel in Pallas Mosaic GPU, fed by XLA.

The sibling's `gpu_tiles.py` is what surrounds the kernel, its `gpu_schedule.py` how the work is cut, and
`gpu_kernel.py` the kernel. All heads share one row a token, so they are the group of one key-value head.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.mla_ragged_paged_attention.gpu_kernel import KEYS, ROWS, attend_tiles
from pallas_kernels.mla_ragged_paged_attention.rows import query_rows, token_rows
from pallas_kernels.ragged_paged_attention.cache import write_rows
from pallas_kernels.ragged_paged_attention.gpu import NUM_SMS, refuse_page_size
from pallas_kernels.ragged_paged_attention.gpu_schedule import TwoCuts
from pallas_kernels.ragged_paged_attention.gpu_tiles import attend_in_tiles, refuse_scale, split_decodes
from pallas_kernels.ragged_paged_attention.options import AttentionOptions


@dataclass(frozen=True)
class Cut:
    """How the work is cut (`gpu_schedule.KeyCut`): in tiles of 64 rows and blocks of 64 keys.

    Attributes:
        stages: blocks of keys in flight.
        splits, pieces: see `KeyCut`.
    """

    stages: int = 2
    splits: int = 0
    pieces: int = 1

    @property
    def rows(self) -> int:
        return ROWS

    @property
    def keys(self) -> int:
        return KEYS


class Tiling(TwoCuts[Cut]):
    """See `TwoCuts`."""

    cut = Cut


def attend(
    q_latent: jax.Array,
    q_rope: jax.Array,
    latent: jax.Array,
    k_rope: jax.Array,
    pages: jax.Array,
    layer: jax.Array | int,
    page_table: jax.Array,
    seq_lens: jax.Array,
    query_starts: jax.Array,
    options: AttentionOptions,
    *,
    tiling: Tiling | None = None,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See `mla_ragged_paged_attention`.

    Args:
        tiling: how the work is cut; by default what `choose_tiling` says.
        interpret: `plgpu.InterpretGPUParams` to simulate the kernel on a CPU.

    Raises:
        ValueError: what this kernel cannot do.
    """
    _refuse_unsupported(q_latent, q_rope, pages, options)
    rank = q_latent.shape[2]
    pages = write_rows(token_rows(latent, k_rope, pages), pages, layer, page_table, seq_lens, query_starts)
    if tiling is None:
        tiling = choose_tiling(q_latent.shape[1], pages, page_table, options)
    out, lse = attend_in_tiles(
        query_rows(q_latent, q_rope, rank + q_rope.shape[2]),
        1,
        pages,
        layer,
        page_table,
        seq_lens,
        query_starts,
        options,
        short=tiling.short,
        long=tiling.long,
        kernel=functools.partial(attend_tiles, rank=rank, interpret=interpret),
    )
    return out, pages, lse


def choose_tiling(heads: int, pages: jax.Array, page_table: jax.Array, options: AttentionOptions) -> Tiling:
    """As many stages as shared memory holds, and decodes cut into four rounds of work for the device."""
    if not options.decode_only and page_table.shape[1] * pages.shape[2] <= 4096:
        return Tiling(Cut(), Cut())
    splits, pieces = split_decodes(heads, 1, page_table.shape[0], NUM_SMS, ROWS, options)
    return Tiling(Cut(splits=splits, pieces=pieces), Cut())


def _refuse_unsupported(
    q_latent: jax.Array, q_rope: jax.Array, pages: jax.Array, options: AttentionOptions
) -> None:
    rank, width, page_size = q_latent.shape[2], q_latent.shape[2] + q_rope.shape[2], pages.shape[2]
    if q_latent.dtype not in (jnp.bfloat16, jnp.float16) or pages.dtype != q_latent.dtype:
        raise ValueError(
            f"The gpu backend multiplies bfloat16 or float16 with pages of the same; q_latent is "
            f"{q_latent.dtype.name} and pages are {pages.dtype.name}. Use backend='xla'."
        )
    refuse_scale("gpu", options)
    if rank % 128 or rank > 512 or width % 64 or width > 576 or pages.shape[3] % 8:
        raise ValueError(
            "The gpu backend needs latents of 128, 256, 384 or 512 numbers, with the rotated key a multiple "
            f"of 64 up to 576, in rows of a multiple of 8; got {rank}, {width} and {pages.shape[3]}. Use "
            "backend='xla'."
        )
    refuse_page_size(page_size)
