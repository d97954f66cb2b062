"""Several hosts as one machine: JAX's multi-controller runtime, started and ended."""

from __future__ import annotations

import jax
from jax.sharding import Mesh

from sharding.errors import ShardingError

# JAX ends every process once it has not heard of one for so many seconds. Whoever watches the hosts
# himself knows it earlier, and can say so.
_HEARTBEAT_TIMEOUT = 100


def join_hosts(address: str, num_hosts: int, host: int, *, timeout: int, shutdown_timeout: int = 20) -> None:
    """Makes the devices of all hosts one list, `jax.devices()`; every host must call it, and waits for all.

    Args:
        address: "host:port" of host 0, which listens there.
        num_hosts: processes that take part, one a host.
        host: which of them this is, from 0.
        timeout: seconds to wait for the others.
        shutdown_timeout: seconds that `leave_hosts` waits for them.

    Raises:
        ShardingError: JAX has been used before in this process, the hosts did not find each other, or the
            machine numbers its hosts in another way.
    """
    if jax.distributed.is_initialized():
        raise ShardingError("this process has joined its hosts already, which can be done once")
    try:
        jax.distributed.initialize(
            address,
            num_hosts,
            host,
            cluster_detection_method="deactivate",
            initialization_timeout=timeout,
            heartbeat_timeout_seconds=_HEARTBEAT_TIMEOUT,
            shutdown_timeout_seconds=shutdown_timeout,
        )
    except RuntimeError as error:
        if "must be called before" in str(error):
            raise ShardingError(
                "JAX has been used in this process already; hosts must be joined before its first array or"
                " jax.devices()"
            ) from error
        raise ShardingError(f"host {host} could not join the others at {address}: {error}") from error
    if jax.process_index() != host or jax.process_count() != num_hosts:
        raise ShardingError(
            f"this is process {jax.process_index()} of {jax.process_count()} to the machine, and was started"
            f" as host {host} of {num_hosts}; number the hosts as the machine does"
        )


def leave_hosts() -> None:
    """Ends what `join_hosts` began, once all hosts do; nothing happens where it never began."""
    jax.distributed.shutdown()


def check_every_host_takes_part(mesh: Mesh) -> None:
    """Refuses a mesh that leaves a host without work.

    Raises:
        ShardingError: no device of some host is in the mesh.
    """
    taking_part = {device.process_index for device in mesh.devices.flat}
    idle = sorted(set(range(jax.process_count())) - taking_part)
    if idle:
        raise ShardingError(
            f"a mesh of {mesh.size} devices has none of host {', '.join(map(str, idle))}; there are"
            f" {len(jax.devices())} devices on {jax.process_count()} hosts: use them all, or fewer hosts"
        )
