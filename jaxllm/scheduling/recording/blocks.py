"""What prompts have in common, without what they say: names of blocks of tokens, and segments of a trace."""

from __future__ import annotations

import base64
import secrets
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import count
from typing import Any

from jaxllm.request import NO_TERMS, Request, SchedulingTerms
from jaxllm.scheduling.prefix_cache import PageHasher

_NAME_BYTES = 6
"""48 bits: among a million blocks two have one name by chance in one file of 560."""
_MOST_BLOCKS = 1 << 20
"""Blocks that are remembered for later prompts; a KV cache of so many pages is larger than any."""

Segments = tuple[tuple[int, int], ...]


class BlockHasher:
    """Names the full blocks of a request's tokens; equal names mean equal tokens from the first on.

    The digests are keyed with a number that is drawn here and written nowhere, so that a name says
    nothing about its text, not even to who guesses it.

    Args:
        block_size: tokens of a block: those of a KV page, as the prefix cache finds no less.
    """

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self._key = secrets.token_hex(16)

    def names(self, request: Request) -> str:
        """The names of all its blocks, in base64. Takes time in proportion to its tokens."""
        hasher = PageHasher(self.block_size, (self._key, request.cache_salt))
        hasher.extend(request.token_ids)
        return base64.b64encode(b"".join(digest[:_NAME_BYTES] for digest in hasher.digests)).decode()


@dataclass(frozen=True, slots=True)
class HashedRequest:
    """A request that ended, as a recording has it.

    Attributes:
        arrival_time: seconds from the start of the recording.
        output_len: tokens that it generated.
        blocks: names of the blocks of its prompt and output.
    """

    arrival_time: float
    num_prompt_tokens: int
    output_len: int
    block_size: int
    blocks: str
    terms: SchedulingTerms = NO_TERMS

    def row(self) -> dict[str, object]:
        """The object of JSON that stands for it in a trace."""
        return {
            "arrival_time": round(self.arrival_time, 6),
            "prompt_len": self.num_prompt_tokens,
            "output_len": self.output_len,
            "block_size": self.block_size,
            "blocks": self.blocks,
            "terms": self.terms.given(),
        }

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> HashedRequest:
        """The inverse of `row`.

        Raises:
            KeyError, TypeError, ValueError: it is no such row.
        """
        request = cls(
            float(row["arrival_time"]),
            int(row["prompt_len"]),
            int(row["output_len"]),
            int(row["block_size"]),
            str(row["blocks"]),
            SchedulingTerms(**row.get("terms", {})),
        )
        if min(request.num_prompt_tokens, request.block_size) < 1:
            raise ValueError("prompt_len and block_size must be at least 1")
        base64.b64decode(request.blocks, validate=True)
        return request


class SharedPrefixes:
    """Tells of each prompt which blocks it begins with that an earlier sequence had, prompt or output.

    A sequence is a row of segments, and a segment is a name and a length; a later prompt that shares
    its first blocks begins with these segments, the last of them cut off where the common part ends.
    """

    def __init__(self) -> None:
        self._segments_of: OrderedDict[bytes, Segments] = OrderedDict()
        self._next_name = count(1)

    def add(self, request: HashedRequest) -> tuple[Segments, int]:
        """The prompt's segments, and the name of the output; requests are given in order of arrival."""
        data, size = base64.b64decode(request.blocks), request.block_size
        blocks = [data[i : i + _NAME_BYTES] for i in range(0, len(data), _NAME_BYTES)]
        known, common = 0, ()  # type: tuple[int, Segments]
        for block in blocks[: request.num_prompt_tokens // size]:
            found = self._segments_of.get(block)
            if found is None:
                break
            known, common = known + size, found
        segments = _cut(common, known)
        if known < request.num_prompt_tokens:
            segments += ((next(self._next_name), request.num_prompt_tokens - known),)
        output_name = next(self._next_name)
        whole = (*segments, (output_name, request.output_len))
        for block in blocks:
            # The newest owner: of several, its pages are the likeliest to be cached.
            self._segments_of[block] = whole
            self._segments_of.move_to_end(block)
        while len(self._segments_of) > _MOST_BLOCKS:
            self._segments_of.popitem(last=False)
        return segments, output_name


def _cut(segments: Segments, length: int) -> Segments:
    """The first `length` tokens."""
    kept = []
    for name, size in segments:
        if length <= 0:
            break
        kept.append((name, min(size, length)))
        length -= size
    return tuple(kept)
