"""Named shapes that tests and benchmarks share: latent attention layers, as one device sees them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LatentShape:
    """One layer's attention: heads of one device, the width of a latent and of a rotated key."""

    heads: int
    kv_lora_rank: int = 512
    rope_dim: int = 64


LAYERS = {
    "deepseek-v2-lite": LatentShape(16),
    "deepseek-v2 tp4": LatentShape(32),
    "deepseek-v3": LatentShape(128),
}
