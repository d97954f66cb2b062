"""Mesh axes, logical-axis rules, and placing arrays by them. Knows JAX and nothing of jaxllm."""

from sharding.errors import ShardingError
from sharding.hosts import check_every_host_takes_part, join_hosts, leave_hosts
from sharding.mesh import MESH_AXES, make_mesh
from sharding.rules import DEFAULT_RULES, MeshAxes, Rules, named_sharding, names_of, partition_spec
from sharding.shards import on_shards, over_axes
from sharding.top_k import sharded_top_k

__all__ = [
    "DEFAULT_RULES",
    "MESH_AXES",
    "MeshAxes",
    "Rules",
    "ShardingError",
    "check_every_host_takes_part",
    "join_hosts",
    "leave_hosts",
    "make_mesh",
    "named_sharding",
    "names_of",
    "on_shards",
    "over_axes",
    "partition_spec",
    "sharded_top_k",
]
