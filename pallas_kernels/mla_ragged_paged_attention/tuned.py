"""What tilings of latent attention are tuned for; the sibling's tables hold them under keys of their own."""

from __future__ import annotations

import jax


def shape_key(q_latent: jax.Array, q_rope: jax.Array, pages: jax.Array, *, decode_only: bool) -> str:
    """The layer, the pages and the kind of step, but not the lengths; operands as the op takes them."""
    _, heads, rank = q_latent.shape
    kind = "decode" if decode_only else "mixed"
    return (
        f"latent {kind}, {heads} heads, latents of {rank} and {q_rope.shape[2]}, {q_latent.dtype.name}, "
        f"pages of {pages.shape[2]} {pages.dtype.name}"
    )
