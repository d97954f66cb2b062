"""Tile sizes that were measured to be best, a table for each kind of device; `benchmarks.tune` writes them.

A table is `tuned/<kind of device>.json`: backend to shape to the fields of that backend's tiling.
"""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import Any

import jax

Table = dict[str, dict[str, dict[str, Any]]]

FOLDER = Path(__file__).parent / "tuned"


def shape_key(q: jax.Array, kv_pages: jax.Array, *, decode_only: bool) -> str:
    """What a tiling is tuned for: the layer, the pages and the kind of step, but not the lengths.

    Args:
        q: [T, num_heads, head_dim], kv_pages: as the op takes them; only shapes and dtypes are looked at.
    """
    _, heads, head_dim = q.shape
    page_size, rows = kv_pages.shape[2:4]
    kind = "decode" if decode_only else "mixed"
    return (
        f"{kind}, {heads} heads, {rows // 2} kv heads, head_dim {head_dim}, {q.dtype.name}, "
        f"pages of {page_size} {kv_pages.dtype.name}"
    )


def table_path(device_kind: str) -> Path:
    """Where the table of a kind of device is."""
    return FOLDER / f"{re.sub(r'[^a-z0-9]+', '-', device_kind.lower()).strip('-')}.json"


@functools.cache
def read_table(device_kind: str) -> Table:
    """The table of a kind of device; empty where nothing was tuned."""
    path = table_path(device_kind)
    return json.loads(path.read_text()) if path.exists() else {}


def tuned_tiling(backend: str, key: str) -> Any:
    """The fields of the best tiling of a shape on this process's device, or None where none was measured."""
    return read_table(jax.devices()[0].device_kind).get(backend, {}).get(key)
