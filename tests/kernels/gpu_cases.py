"""What the GPU kernels are compiled for without a GPU, as shapes alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.mla_ragged_paged_attention.shapes import LatentShape
from pallas_kernels.ragged_paged_attention.options import AttentionOptions
from pallas_kernels.ragged_paged_attention.shapes import LayerShape


@dataclass(frozen=True)
class Case:
    layer: LayerShape
    decode_only: bool
    page_size: int = 16
    num_seqs: int = 64
    dtype: Any = jnp.bfloat16
    cache_dtype: Any = None
    tree_width: int | None = None

    @property
    def num_tokens(self) -> int:
        return self.num_seqs if self.decode_only else 2048

    def arrays(self, array: Callable[..., jax.ShapeDtypeStruct]) -> dict[str, jax.ShapeDtypeStruct]:
        """The options that are arrays; `array` makes one of a shape and a dtype, int32 unless said."""
        layer = self.layer
        arrays: dict[str, jax.ShapeDtypeStruct] = {}
        if layer.sinks:
            arrays["sinks"] = array(layer.heads, dtype=jnp.float32)
        if layer.alibi:
            arrays["alibi_slopes"] = array(layer.heads, dtype=jnp.float32)
        if layer.spans:
            arrays["span_ends"] = array(self.num_tokens)
        if self.tree_width is not None:
            arrays["tree_mask"] = array(self.num_tokens, self.tree_width, dtype=jnp.bool)
        if self.cache_dtype is not None:
            arrays["k_scale"] = arrays["v_scale"] = array(dtype=jnp.float32)
        return arrays

    def options(self, arrays: dict[str, Any]) -> AttentionOptions:
        """All options, with those that are arrays."""
        return AttentionOptions(
            scale=self.layer.head_dim**-0.5,
            window=self.layer.window,
            soft_cap=self.layer.soft_cap,
            decode_only=self.decode_only,
            **arrays,
        )


@dataclass(frozen=True)
class LatentCase:
    layer: LatentShape
    decode_only: bool
    page_size: int = 64
    num_seqs: int = 64
    dtype: Any = jnp.bfloat16

    def operands(self, array: Callable[..., jax.ShapeDtypeStruct]) -> list[jax.ShapeDtypeStruct]:
        """What the op takes before the layer; `array` as above."""
        layer, tokens = self.layer, self.num_seqs if self.decode_only else 2048
        shapes: list[tuple[int, ...]] = [(tokens, layer.heads, layer.kv_lora_rank)]
        shapes += [(tokens, layer.heads, layer.rope_dim), (tokens, layer.kv_lora_rank)]
        shapes += [(tokens, layer.rope_dim), (2, 4096, self.page_size, layer.width)]
        return [array(*shape, dtype=self.dtype) for shape in shapes]

    def options(self) -> AttentionOptions:
        return AttentionOptions(scale=self.layer.width**-0.5, decode_only=self.decode_only)
