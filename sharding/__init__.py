"""Mesh axes, logical-axis rules, and placing arrays by them. Knows JAX and nothing of jaxllm."""

from sharding.errors import ShardingError
from sharding.mesh import MESH_AXES, make_mesh
from sharding.rules import DEFAULT_RULES, Rules, named_sharding, partition_spec

__all__ = [
    "DEFAULT_RULES",
    "MESH_AXES",
    "Rules",
    "ShardingError",
    "make_mesh",
    "named_sharding",
    "partition_spec",
]
