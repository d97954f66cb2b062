"""Hosts of a Ray cluster: one actor on each but this one runs what a host that is started by hand runs."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from typing import Any

from jaxllm.config import EngineConfig
from jaxllm.errors import ConfigError, HostError
from jaxllm.execution.hosts.group import HostGroup
from jaxllm.execution.hosts.startup import DEFAULT_TIMEOUT, check_hosts, meet_hosts

logger = logging.getLogger(__name__)

# What Ray calls a node of a TPU slice, and the node's number in it.
_SLICE, _SLICE_HOST = "ray.io/tpu-slice-name", "ray.io/tpu-worker-id"
_NODE_ID = "ray.io/node-id"
_ACCELERATORS = ("TPU", "GPU")
# Variables of this process that the others get, too.
_CARRIED = ("JAX", "XLA", "JAXLLM", "HF_", "LIBTPU", "TPU_LIBRARY", "NCCL", "PYTHONPATH")


@dataclass(frozen=True, slots=True)
class RayHost:
    """A node that takes part.

    Attributes:
        node_id: Ray's.
        resources: that one actor takes all of.
    """

    node_id: str
    resources: Mapping[str, float]


def choose_hosts(nodes: Sequence[Mapping[str, Any]], here: str, config: EngineConfig) -> list[RayHost]:
    """The nodes of a cluster that share a model, this one first.

    A node of a TPU slice brings its whole slice, in the slice's own order. Otherwise nodes with as many
    accelerators of the same kind take part, as many as the devices asked for; without accelerators all do.
    `nnodes` above 1 says how many.

    Args:
        nodes: as `ray.nodes()` has them.
        here: id of the node that this process runs on.

    Raises:
        ConfigError: there are not so many such nodes, or this is not the first host of its slice.
    """
    alive = {node["NodeID"]: node for node in nodes if node["Alive"]}
    own = alive[here]
    accelerator = next((name for name in _ACCELERATORS if own["Resources"].get(name)), None)
    each = int(own["Resources"][accelerator]) if accelerator else 0
    slice_name = own.get("Labels", {}).get(_SLICE)
    wanted = config.nnodes if config.nnodes > 1 else None
    if slice_name is not None:
        found = [node for node in alive.values() if node["Labels"].get(_SLICE) == slice_name]
        found.sort(key=lambda node: int(node["Labels"][_SLICE_HOST]))
        if found[0]["NodeID"] != here:
            raise ConfigError(
                f"This is host {own['Labels'][_SLICE_HOST]} of the TPU slice {slice_name!r}; start the"
                " engine on its host 0.",
                param="distributed_executor_backend",
            )
        kind, wanted = f"hosts of the TPU slice {slice_name!r}", wanted or len(found)
    else:
        alike = [n for n in alive.values() if not accelerator or n["Resources"].get(accelerator) == each]
        found = sorted(alike, key=lambda node: (node["NodeID"] != here, node["NodeID"]))
        kind = f"nodes with {each} {accelerator}s" if accelerator else "nodes"
        devices = config.tensor_parallel_size * config.pipeline_parallel_size * config.data_parallel_size
        wanted = wanted or (-(-devices // each) if accelerator else len(found))
    if len(found) < wanted or (slice_name is not None and len(found) > wanted):
        raise ConfigError(
            f"{wanted} hosts are needed, and the Ray cluster has {len(found)} {kind}; give nnodes as many, or"
            " let further nodes join (ray start --address=...).",
            param="nnodes",
        )
    resources = {"CPU": 1.0, **({accelerator: float(each)} if accelerator else {})}
    return [RayHost(node["NodeID"], resources) for node in found[:wanted]]


def run_host(settings: dict[str, Any]) -> int:
    """What an actor runs."""
    # Only here: this module is imported where no device is to be touched.
    from jaxllm.execution.hosts.worker import run_worker

    logging.basicConfig(level=logging.INFO)
    return run_worker(EngineConfig(**settings))


def meet_ray_hosts(config: EngineConfig) -> HostGroup | None:
    """Starts the other hosts through the Ray cluster that this one belongs to, and joins them.

    Returns:
        None where the cluster has this host alone.

    Raises:
        ConfigError: Ray is not installed, no cluster runs, or it lacks what is asked for.
        HostError: a host failed, or does not come.
    """
    ray = _import_ray()
    if not ray.is_initialized():
        try:
            ray.init(address="auto", logging_level=logging.WARNING)
        except ConnectionError as error:
            raise ConfigError(
                "distributed_executor_backend='ray', and no Ray cluster runs here. Start one: `ray start"
                " --head` on this host and `ray start --address=HOST:6379` on the others.",
                param="distributed_executor_backend",
            ) from error
    hosts = choose_hosts(ray.nodes(), ray.get_runtime_context().get_node_id(), config)
    if len(hosts) == 1:
        return None
    timeout = config.distributed_timeout_seconds or DEFAULT_TIMEOUT
    address = ray.util.get_node_ip_address()
    listener = _two_ports(address)
    with closing(listener):
        config = replace(
            config, nnodes=len(hosts), master_addr=address, master_port=listener.getsockname()[1]
        )
        check_hosts(config)
        placement = ray.util.placement_group(
            [dict(host.resources) for host in hosts],
            strategy="STRICT_SPREAD",
            bundle_label_selector=[{_NODE_ID: host.node_id} for host in hosts],
        )
        try:
            ray.get(placement.ready(), timeout=timeout)
        except ray.exceptions.GetTimeoutError as error:
            ray.util.remove_placement_group(placement)
            raise HostError(
                f"Ray did not free {dict(hosts[0].resources)} on {len(hosts)} nodes within {timeout} s;"
                " see `ray status` for who holds them"
            ) from error
        # Ray ends an actor to which nobody holds a handle.
        actors = [_start(ray, placement, hosts[i], i, config) for i in range(1, len(hosts))]
        results = [result for _, result in actors]

        def check_coming() -> str | None:
            ended, _ = ray.wait(results, num_returns=1, timeout=0)
            if not ended:
                return None
            try:
                return (
                    f"a host ended with status {ray.get(ended[0])} before it had joined; see Ray's log of it"
                )
            except ray.exceptions.RayError as error:
                return f"a host could not be started by Ray: {error}"

        try:
            group = meet_hosts(config, listener, check_coming)
        except BaseException:
            ray.util.remove_placement_group(placement)  # And all that runs in it.
            raise
    group.let_go = lambda: _let_go(ray, placement, actors)
    return group


def _start(ray: Any, placement: Any, host: RayHost, number: int, config: EngineConfig) -> tuple[Any, Any]:
    """An actor, and the result that it has once its host ends."""
    resources = dict(host.resources)
    actor = ray.remote(_Host).options(
        num_cpus=resources.pop("CPU"),
        num_gpus=resources.pop("GPU", 0),
        resources=resources,
        scheduling_strategy=ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy(
            placement, placement_group_bundle_index=number
        ),
        runtime_env={"env_vars": {k: v for k, v in os.environ.items() if k.startswith(_CARRIED)}},
        max_restarts=0,
    )
    settings = asdict(replace(config, node_rank=number, distributed_executor_backend="mp"))
    handle = actor.remote()
    return handle, handle.run.remote(settings)


class _Host:
    """The actor."""

    def run(self, settings: dict[str, Any]) -> int:
        return run_host(settings)


def _let_go(ray: Any, placement: Any, actors: list[tuple[Any, Any]]) -> None:
    """Gives Ray its resources back once the hosts have ended."""
    ray.wait([result for _, result in actors], num_returns=len(actors), timeout=20)
    ray.util.remove_placement_group(placement)


def _import_ray() -> Any:
    try:
        import ray
        import ray.util.scheduling_strategies
    except ImportError as error:
        raise ConfigError(
            "distributed_executor_backend='ray' needs Ray: pip install 'jaxllm[ray]' on every host.",
            param="distributed_executor_backend",
        ) from error
    return ray


def _two_ports(address: str) -> socket.socket:
    """A socket that listens on a free port whose successor, which JAX's coordinator takes, is free, too."""
    for _ in range(100):
        listener = socket.create_server((address, 0))
        port = listener.getsockname()[1]
        try:
            socket.create_server((address, port + 1)).close()
            return listener
        except (OSError, OverflowError):
            listener.close()
    raise HostError(f"{address} has no two free ports in a row")
