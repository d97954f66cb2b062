"""Named shapes that tests and benchmarks share: latent attention layers, as one device sees them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LatentShape:
    """One layer's attention: heads of one device, the width of a latent and of a rotated key.

    It counts as `ragged_paged_attention.shapes.CountedShape` says.
    """

    heads: int
    kv_lora_rank: int = 512
    rope_dim: int = 64
    window: None = None

    @property
    def width(self) -> int:
        """Numbers of a key: the latent, which is the value, too, and the rotated key."""
        return self.kv_lora_rank + self.rope_dim

    def kv_bytes_per_token(self, itemsize: int) -> int:
        """Bytes of a token's row, which is read once as key and as value, whatever the heads."""
        return self.width * itemsize

    @property
    def flops_per_pair(self) -> int:
        return 2 * self.heads * (self.width + self.kv_lora_rank)

    @property
    def numbers_per_query(self) -> int:
        return self.heads * (self.width + self.kv_lora_rank)


LAYERS = {
    "deepseek-v2-lite": LatentShape(16),
    "deepseek-v2 tp4": LatentShape(32),
    "deepseek-v3": LatentShape(128),
    "deepseek-v3 tp8": LatentShape(16),
}
