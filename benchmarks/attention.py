"""The attention ops at a named shape: operands, passes to be timed, and what a device has room for."""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxllm.execution.platform import free_memory
from pallas_kernels import mla_ragged_paged_attention as latent_op
from pallas_kernels import ragged_paged_attention as op
from pallas_kernels.mla_ragged_paged_attention.shapes import LAYERS as LATENT_LAYERS
from pallas_kernels.mla_ragged_paged_attention.shapes import LatentShape
from pallas_kernels.ragged_paged_attention import cpu
from pallas_kernels.ragged_paged_attention.shapes import LAYERS as KEY_VALUE_LAYERS
from pallas_kernels.ragged_paged_attention.shapes import LayerShape, Work

Shape = LayerShape | LatentShape
LAYERS: dict[str, Shape] = {**KEY_VALUE_LAYERS, **LATENT_LAYERS}

MAX_LAYERS = 4
# More than any cache holds: a layer of so many bytes needs no others beside it to be read from memory.
LARGE = 128 << 20

# Runs so many passes over the layers of a cache, and waits for the last.
Passes = Callable[[int], None]


class Dense(NamedTuple):
    """Sequences of like lengths without pages; S sequences, N queries and L keys each.

    Attributes:
        q: [S, N, kv_heads, group, D], the last N positions of each sequence.
        layers: of each layer, keys [S, L, kv_heads, D] and values [S, L, kv_heads, value_dim].
    """

    q: jax.Array
    layers: list[tuple[jax.Array, jax.Array]]


class Setting:
    """One shape, and while it is timed, its operands: numbers that look random, on the default device.

    Args:
        num_layers: of the cache, whose pages stand in random order.

    Attributes:
        op: takes new, pages, a layer and batch by position, and options by name.
        new, pages: what the op takes; without values until `fill` and after `empty`.
        batch: page table, lengths and starts.
    """

    def __init__(
        self, layer: Shape, work: Work, dtype: Any, page_size: int, num_layers: int, seed: int
    ) -> None:
        self.layer, self.work, self.num_layers, self.seed = layer, work, num_layers, seed
        is_latent = isinstance(layer, LatentShape)
        self.op: Any = latent_op.mla_ragged_paged_attention if is_latent else op.ragged_paged_attention
        rng = np.random.default_rng(seed)
        lengths = np.array([cached + new for cached, new in work.sequences], np.int32)
        pages_of = -(-lengths // page_size)
        num_pages = 1 + int(pages_of.sum())
        order = 1 + rng.permutation(num_pages - 1)
        table = np.zeros((len(lengths), int(pages_of.max())), np.int32)
        for own, end, count in zip(table, np.cumsum(pages_of), pages_of, strict=True):
            own[:count] = order[end - count : end]
        starts = np.cumsum([0, *(new for _, new in work.sequences)], dtype=np.int32)
        self.batch = (table, lengths, starts)
        if isinstance(layer, LatentShape):
            rank, rope = layer.kv_lora_rank, layer.rope_dim
            new: list[tuple[int, ...]] = [(layer.heads, rank), (layer.heads, rope), (rank,), (rope,)]
            where: latent_op.Backend = "tpu" if jax.default_backend() == "tpu" else "xla"
            row: tuple[int, ...] = (math.prod(latent_op.cache_rows(where, rank, rope)),)
            self.options: dict[str, Any] = {"scale": layer.width**-0.5}
        else:
            pair = (layer.kv_heads, layer.head_dim)
            new, row = [(layer.heads, layer.head_dim), pair, pair], (2 * layer.kv_heads, layer.head_dim)
            self.options = {"scale": layer.head_dim**-0.5, "window": layer.window, "soft_cap": layer.soft_cap}
            if layer.sinks:
                self.options["sinks"] = jnp.linspace(-1, 1, layer.heads)
            if layer.alibi:
                self.options["alibi_slopes"] = 2.0 ** -jnp.linspace(0.25, 8, layer.heads)
            if layer.spans:
                self.options["span_ends"] = jnp.zeros(work.num_tokens, jnp.int32)
        self.options["decode_only"] = work.decode_only
        self.new: Any = [jax.ShapeDtypeStruct((work.num_tokens, *shape), dtype) for shape in new]
        self.pages: Any = jax.ShapeDtypeStruct((num_layers, num_pages, page_size, *row), dtype)

    def fill(self) -> None:
        """Gives the operands values."""
        self.new = [numbers(x.shape, x.dtype, self.seed + i) for i, x in enumerate(self.new)]
        self.pages = numbers(self.pages.shape, self.pages.dtype, self.seed + len(self.new))

    def empty(self) -> None:
        """Lets the memory of the operands go."""
        self.new, self.pages = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (self.new, self.pages)
        )

    def passes(self, backend: str, tiling: Any = None) -> Passes:
        """The op over all layers, compiled; each call writes its new tokens into the pages of its layer."""
        attend = functools.partial(self.op, backend=backend, tiling=tiling, **self.options)
        num_layers = self.num_layers

        @functools.partial(jax.jit, donate_argnums=1)
        def run(new, pages, batch, count):  # type: ignore[no-untyped-def]
            def once(index, carry):  # type: ignore[no-untyped-def]
                return attend(*new, carry[1], index % num_layers, *batch)

            return lax.fori_loop(0, count * num_layers, once, (jnp.zeros_like(new[0]), pages))

        compiled = run.lower(self.new, self.pages, self.batch, np.int32(0)).compile()

        def passes(count: int) -> None:
            out, self.pages = compiled(self.new, self.pages, self.batch, np.int32(count))
            out.block_until_ready()

        return passes

    def dense(self) -> list[Dense]:
        """The same without pages; sequences that follow on each other and have the same lengths, together."""
        if isinstance(self.pages, jax.ShapeDtypeStruct):
            parts: list[Dense] = jax.eval_shape(self._dense, self.new, self.pages)
            return parts
        return self._dense(self.new, self.pages)

    def _dense(self, new: list[jax.Array], pages: jax.Array) -> list[Dense]:
        table, _, starts = self.batch
        first, parts = 0, []
        for (cached, own), count in self.work.groups():
            rows = slice(int(starts[first]), int(starts[first + count]))
            places = table[first : first + count, : -(-(cached + own) // pages.shape[2])]
            layers = [_gathered(pages, i, places, cached + own, self.layer) for i in range(self.num_layers)]
            parts.append(Dense(self._dense_queries(new, rows, count), layers))
            first += count
        return parts

    def _dense_queries(self, new: list[jax.Array], rows: slice, count: int) -> jax.Array:
        if isinstance(self.layer, LatentShape):
            q, kv_heads = jnp.concatenate([x[rows] for x in new[:2]], axis=-1), 1
        else:
            q, kv_heads = new[0][rows], self.layer.kv_heads
        return q.reshape(count, -1, kv_heads, self.layer.heads // kv_heads, q.shape[-1])


@functools.partial(jax.jit, static_argnames=("length", "shape"))
def _gathered(
    pages: jax.Array, layer: int, places: jax.Array, length: int, shape: Shape
) -> tuple[jax.Array, jax.Array]:
    """Keys and values of sequences whose pages are places [S, P], as `Dense` holds them."""
    found = pages[layer, places]
    found = found.reshape(len(places), -1, *found.shape[3:])[:, :length]
    if isinstance(shape, LatentShape):
        return found[:, :, None, : shape.width], found[:, :, None, : shape.kv_lora_rank]
    return found[:, :, ::2], found[:, :, 1::2]


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def numbers(shape: tuple[int, ...], dtype: Any, seed: int) -> jax.Array:
    """Numbers of mean 0 and variance 1 that look random, as fast as memory takes them (hashes of places)."""
    x = lax.iota(jnp.uint32, math.prod(shape)) + jnp.uint32(seed * 0x9E3779B9 & 0xFFFFFFFF)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = (x ^ (x >> shift)) * jnp.uint32(factor)
    uniform = lax.bitcast_convert_type((x >> 9) | jnp.uint32(0x3F800000), jnp.float32) - 1.5  # [-0.5, 0.5)
    return (uniform * math.sqrt(12)).astype(dtype).reshape(shape)


def free_bytes() -> int:
    return free_memory(jax.devices()[0])[1]


def layers_that_fit(layer: Shape, work: Work, dtype: Any) -> int:
    """Layers of the cache, of those that are wanted, that an eighth of the free memory holds.

    What peers read takes as much again, and gathering it twice that.
    """
    size = layer.kv_bytes_per_token(dtype.itemsize) * sum(cached + new for cached, new in work.sequences)
    return min(MAX_LAYERS, max(1, LARGE // size), free_bytes() // 8 // size)


def backends_here(layer: Shape, dtype: Any) -> list[str]:
    """The backends that this machine can run, the oracle left out."""
    if jax.default_backend() == "tpu":
        return ["xla", "tpu"]
    if jax.default_backend() == "gpu":
        capability = float(jax.devices()[0].compute_capability)
        has_triton = importlib.util.find_spec("jax_triton") is not None
        triton = ["triton"] if has_triton and capability >= 8.0 else []
        mosaic = ["gpu"] if capability >= 9.0 and dtype != jnp.float32 else []
        known = latent_op.BACKENDS if isinstance(layer, LatentShape) else op.BACKENDS
        return [name for name in ("xla", *triton, *mosaic) if name in known]
    if isinstance(layer, LatentShape) or cpu.missing(dtype):
        return ["xla"]
    return ["xla", "cpu"]
