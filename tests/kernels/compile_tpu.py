"""Compiling the TPU kernel for chips that are not here: libtpu is a compiler too, and reports real limits."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.experimental.layout import Format, Layout
from jax.sharding import SingleDeviceSharding

from pallas_kernels.ragged_paged_attention import tpu
from pallas_kernels.ragged_paged_attention.options import AttentionOptions

TOPOLOGIES = {"v5e": "v5e:2x2", "v6e": "v6e:2x2", "v7x": "tpu7x:2x2x1"}
# So that libtpu neither looks for a chip nor asks the network about one.
WITHOUT_A_CHIP = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@dataclass(frozen=True)
class Served:
    """A layer's attention as a model serves it; kv_heads are those of one chip."""

    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    page_size: int = 64
    num_seqs: int = 64
    num_tokens: int = 64
    context: int = 8192
    layers: int = 4
    num_pages: int = 512
    dtype: str = "bfloat16"
    cache_dtype: str = "bfloat16"
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def cache_shape(self) -> tuple[int, ...]:
        """As `tpu.page_rows` says the cache is best held."""
        rows = tpu.page_rows(self.kv_heads, self.head_dim)
        return (self.layers, self.num_pages, self.page_size, *rows)


def without_a_chip() -> None:
    """Tells libtpu that it is here to compile."""
    for name, value in WITHOUT_A_CHIP.items():
        os.environ.setdefault(name, value)


def sharding_on(chip: str) -> SingleDeviceSharding:
    """Where the arrays of a program lie that is compiled for a chip."""
    without_a_chip()
    device = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[chip]).devices[0]
    return SingleDeviceSharding(device)


def compile_layers(chip: str, served: Served, donate: bool = True) -> Any:
    """A loop over layers, each of whose keys depends on the output of the one before, compiled for a chip."""
    here = sharding_on(chip)
    row_major = Format(Layout(tuple(range(5))), here)
    shape_of = {
        "sinks": ((served.heads,), jnp.float32),
        "alibi_slopes": ((served.heads,), jnp.float32),
        "k_scale": ((), jnp.float32),
        "v_scale": ((), jnp.float32),
        "span_ends": ((served.num_tokens,), jnp.int32),
        "tree_mask": ((served.num_tokens, 64), jnp.bool_),
    }

    def array(shape: tuple[int, ...], dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=here)

    given = {
        name: array(*shape_of[name]) if name in shape_of else value for name, value in served.options.items()
    }
    options = AttentionOptions(
        scale=served.head_dim**-0.5, decode_only=served.num_tokens == served.num_seqs, **given
    )

    def layers(
        q: jax.Array, pages: jax.Array, table: jax.Array, lens: jax.Array, starts: jax.Array, options: Any
    ) -> tuple[jax.Array, jax.Array]:
        def layer(index: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            x, pages = carry
            k = x[:, : served.kv_heads]
            view = pages.reshape(*pages.shape[:3], 2 * served.kv_heads, served.head_dim)
            out, view, _ = tpu.attend(x, k, k * 2, view, index, table, lens, starts, options)
            return x + out, view.reshape(pages.shape)

        return jax.lax.fori_loop(0, served.layers, layer, (q, pages))

    jitted = jax.jit(layers, donate_argnums=(1,) if donate else (), out_shardings=(here, row_major))
    return jitted.lower(
        array((served.num_tokens, served.heads, served.head_dim), served.dtype),
        jax.ShapeDtypeStruct(served.cache_shape, served.cache_dtype, sharding=row_major),
        array((served.num_seqs, served.context // served.page_size)),
        array((served.num_seqs,)),
        array((served.num_seqs + 1,)),
        options,
    ).compile()
