"""What a step has to do, counted as a device does it: in blocks and tiles that cost the same half full."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from jaxllm.scheduling.plan import Plan


class Shape(NamedTuple):
    """What a step was compiled for: tokens and sequences, padding included.

    Attributes:
        decode_only: one token of each sequence.
    """

    num_tokens: int
    num_seqs: int
    decode_only: bool


class Tiles(NamedTuple):
    """How an attention kernel cuts its work; see `pallas_kernels/ragged_paged_attention/xla.py`.

    Attributes:
        decode_keys: in a block of a single token's keys.
        fewest_lanes, most_lanes: such blocks computed side by side, between which there are four for each
            sequence of the shape.
        short, long: queries of a tile and keys of a block, of runs of several tokens.
        longest_short: tokens of the longest run of a step that is cut into short tiles.
    """

    decode_keys: int
    fewest_lanes: int
    most_lanes: int
    short: tuple[int, int]
    long: tuple[int, int]
    longest_short: int

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Tiles:
        """What `_asdict` gave, as JSON gives it back."""
        fields: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in values.items()}
        return cls(**fields)

    def keys_of(self, contexts: Iterable[int], shape: Shape) -> int:
        """Keys read for single tokens that see so many each, with those of lanes that idle."""
        blocks = sum(-(-context // self.decode_keys) for context in contexts)
        lanes = min(max(4 * shape.num_seqs, self.fewest_lanes), self.most_lanes)
        return -(-blocks // lanes) * lanes * self.decode_keys

    def tiles_of(self, runs: list[tuple[int, int]], shape: Shape) -> tuple[int, int, int]:
        """Tiles of runs of positions, blocks of keys that they walk over, and pairs of those."""
        longest = max((num_tokens for _, num_tokens in runs), default=0)
        most, keys = self.short if longest <= self.longest_short else self.long
        queries = min(most, shape.num_tokens)
        tiles = blocks = 0
        for start, num_tokens in runs:
            for first in range(start, start + num_tokens, queries):
                tiles += 1
                blocks += -(-min(first + queries, start + num_tokens) // keys)
        return tiles, blocks, blocks * queries * keys


class Work(NamedTuple):
    """What the time of a step depends on besides its shape, counted; or the seconds that one of each takes.

    Attributes:
        decode_keys: keys read in a step of nothing but single tokens.
        mixed_keys: the same for the single tokens of other steps.
        num_prompts: runs of several tokens.
        num_tiles: of the queries of such runs; num_blocks: of keys that they walk over.
        num_pairs: of a query and a key in those, whether it sees it or not.
        copied_pages: pages copied to the host's memory or back.
    """

    decode_keys: float = 0.0
    mixed_keys: float = 0.0
    num_prompts: float = 0.0
    num_tiles: float = 0.0
    num_blocks: float = 0.0
    num_pairs: float = 0.0
    copied_pages: float = 0.0

    @classmethod
    def of(cls, plan: Plan, shape: Shape, tiles: Tiles | None = None) -> Work:
        """The work of a plan; see `of_runs`."""
        work = cls.of_runs([(entry.start, entry.num_tokens) for entry in plan.scheduled], shape, tiles)
        return work._replace(copied_pages=len(plan.copies_out) + len(plan.copies_in))

    @classmethod
    def of_runs(cls, runs: Iterable[tuple[int, int]], shape: Shape, tiles: Tiles | None = None) -> Work:
        """The work of so many runs of positions, each by its first one and its length.

        Args:
            shape: in which they are computed.
            tiles: None counts keys and pairs that are seen, one by one.
        """
        contexts, prompts = [], []
        for start, num_tokens in runs:
            if num_tokens == 1:
                contexts.append(start + 1)
            else:
                prompts.append((start, num_tokens))
        keys = sum(contexts) if tiles is None else tiles.keys_of(contexts, shape)
        if not prompts:
            return cls(decode_keys=keys)
        if tiles is None:
            pairs = sum(n * start + n * (n + 1) // 2 for start, n in prompts)
            return cls(mixed_keys=keys, num_prompts=len(prompts), num_pairs=pairs)
        return cls(0, keys, len(prompts), *tiles.tiles_of(prompts, shape))

    def times(self, prices: Work) -> float:
        """Seconds of so much work at these prices."""
        return sum(amount * price for amount, price in zip(self, prices, strict=True))
