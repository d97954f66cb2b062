"""Run by the tests: a Ray cluster of two nodes on this machine, and an `LLM` over both.

The arguments are those of `offline.py`, which is what runs once the cluster is there.
"""

from __future__ import annotations

import ray
from ray.cluster_utils import Cluster

from tests.hosts import offline


def main() -> None:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        cluster.add_node(num_cpus=1)
        cluster.connect()
        offline.main()
    finally:
        ray.shutdown()
        cluster.shutdown()


if __name__ == "__main__":
    main()
