"""Named shapes that tests, benchmarks and tuning share: the experts of models as one device sees them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ExpertsShape:
    """One layer's experts.

    Attributes:
        experts: how many there are.
        per_token: how many a token takes.
        hidden, inner: widths of the residual stream and of an expert.
    """

    experts: int
    per_token: int
    hidden: int
    inner: int

    def rows(self, tokens: int) -> int:
        """Rows of the grouped products of a batch of so many tokens."""
        return tokens * self.per_token

    def flops(self, tokens: int) -> int:
        """Of gate, up and down, a multiplication and an addition for each number."""
        return 6 * self.hidden * self.inner * self.rows(tokens)


EXPERTS = {
    "mixtral-8x7b": ExpertsShape(8, 2, 4096, 14336),
    "mixtral-8x7b tp8": ExpertsShape(8, 2, 4096, 1792),
    "qwen1.5-moe-a2.7b": ExpertsShape(60, 4, 2048, 1408),
    "qwen3-30b-a3b": ExpertsShape(128, 8, 2048, 768),
    "olmoe-1b-7b": ExpertsShape(64, 8, 2048, 1024),
}
