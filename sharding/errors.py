"""The one exception of this package."""

from __future__ import annotations


class ShardingError(ValueError):
    """A mesh that the devices cannot form, or an array that a mesh cannot hold."""
