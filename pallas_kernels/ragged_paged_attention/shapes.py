"""Named shapes that tests, benchmarks and tuning share: attention layers of models, and batches they meet."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Protocol


class CountedShape(Protocol):
    """What a layer's attention reads and computes, for whatever op.

    Attributes:
        window: as the op takes it.
        flops_per_pair: of a query and a key that it sees, all heads: the two products, a multiplication and
            an addition for each number.
        numbers_per_query: those of a query and of its output, all heads.
    """

    @property
    def window(self) -> int | None: ...
    @property
    def flops_per_pair(self) -> int: ...
    @property
    def numbers_per_query(self) -> int: ...

    def kv_bytes_per_token(self, itemsize: int) -> int:
        """Bytes that the cache holds of a token, of `itemsize` bytes a number."""
        ...


@dataclass(frozen=True)
class LayerShape:
    """One attention layer as one device sees it.

    Attributes:
        heads, kv_heads, head_dim: of the queries, and of keys and values.
        window, soft_cap: as the op takes them.
        sinks, alibi, spans: whether the layer uses `sinks`, `alibi_slopes` or `span_ends`.
    """

    heads: int
    kv_heads: int
    head_dim: int
    window: int | None = None
    soft_cap: float | None = None
    sinks: bool = False
    alibi: bool = False
    spans: bool = False

    def kv_bytes_per_token(self, itemsize: int) -> int:
        """Bytes of a token's key and value, of `itemsize` bytes a number."""
        return 2 * self.kv_heads * self.head_dim * itemsize

    @property
    def flops_per_pair(self) -> int:
        return 4 * self.heads * self.head_dim

    @property
    def numbers_per_query(self) -> int:
        return 2 * self.heads * self.head_dim


LAYERS = {
    "llama-135m": LayerShape(9, 3, 64),
    "llama-3.1-8b": LayerShape(32, 8, 128),
    "llama-3.1-70b tp8": LayerShape(8, 1, 128),
    "qwen3-0.6b": LayerShape(16, 8, 128),
    "qwen3-8b": LayerShape(32, 8, 128),
    "qwen3-30b-a3b": LayerShape(32, 4, 128),
    "gpt-oss-20b": LayerShape(64, 8, 64, sinks=True),
    "gpt-oss-20b sliding": LayerShape(64, 8, 64, sinks=True, window=128),
    "gemma-2-9b": LayerShape(16, 8, 256, soft_cap=50.0),
    "gemma-2-9b sliding": LayerShape(16, 8, 256, soft_cap=50.0, window=4096),
    "gemma-3-4b sliding": LayerShape(8, 4, 256, spans=True, window=1024),
    "bloom-7b1": LayerShape(32, 32, 128, alibi=True),
    # Shapes that hardware does not like: half a lane, three quarters of one, a prime number of heads.
    "opt-125m": LayerShape(12, 12, 64),
    "phi-3-mini": LayerShape(32, 32, 96),
    "falcon-7b": LayerShape(71, 1, 64),
}


@dataclass(frozen=True)
class Work:
    """A batch: for each sequence, its tokens in the cache and its new ones, one query each."""

    sequences: tuple[tuple[int, int], ...]

    @property
    def num_tokens(self) -> int:
        """Queries in the packed batch, T."""
        return sum(new for _, new in self.sequences)

    @property
    def decode_only(self) -> bool:
        """Whether every sequence has one query."""
        return all(new == 1 for _, new in self.sequences)

    def groups(self) -> list[tuple[tuple[int, int], int]]:
        """Sequences that follow on each other and are alike, and how many they are."""
        return [(lengths, len(list(alike))) for lengths, alike in itertools.groupby(self.sequences)]

    def keys_read(self, window: int | None = None) -> int:
        """Tokens whose key and value some query sees, each counted once per sequence."""
        return sum(
            cached + new - (0 if window is None else max(0, cached + 1 - window))
            for cached, new in self.sequences
        )

    def pairs(self, window: int | None = None) -> int:
        """(query, key) pairs that causality and the window allow."""
        return sum(_pairs(cached, new, window) for cached, new in self.sequences)

    def flops(self, layer: CountedShape) -> int:
        """Of the two products; spans not counted."""
        return layer.flops_per_pair * self.pairs(layer.window)

    def num_bytes(self, layer: CountedShape, itemsize: int) -> int:
        """That must be moved: what some query sees of the cache, the new tokens, queries and output."""
        kept = layer.kv_bytes_per_token(itemsize) * (self.keys_read(layer.window) + self.num_tokens)
        return kept + self.num_tokens * layer.numbers_per_query * itemsize


def _pairs(cached: int, new: int, window: int | None) -> int:
    """Of one sequence: the query at position p sees min(p + 1, window) keys."""
    total = cached + new
    limit = total if window is None else min(window, total)

    def up_to(position: int) -> int:  # of the queries before this position
        growing = min(position, limit)
        return growing * (growing + 1) // 2 + (position - growing) * limit

    return up_to(total) - up_to(cached)


def _size(tokens: int) -> str:
    return f"{tokens // 1024}k" if tokens % 1024 == 0 else str(tokens)


WORKS = {
    **{
        f"decode {batch} x {_size(context)}": Work(((context - 1, 1),) * batch)
        for context in (1024, 8192, 32768, 131072)
        for batch in (1, 8, 64, 256)
    },
    **{f"prefill {_size(chunk)}": Work(((0, chunk),)) for chunk in (128, 512, 2048, 8192)},
    "prefill 2k after 32k": Work(((32768, 2048),)),
    "prefill 16 x 512": Work(((0, 512),) * 16),
    "mixed 64 x 2k and 1984": Work((*((2047, 1),) * 64, (0, 1984))),
    "mixed 31 x 8k and 481 after 4k": Work((*((8191, 1),) * 31, (4096, 481))),
}
