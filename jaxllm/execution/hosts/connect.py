"""Host 0's way from a configuration to hosts that do what its runner says."""

from __future__ import annotations

import atexit
from collections.abc import Iterator
from contextlib import contextmanager

from jaxllm.config import EngineConfig
from jaxllm.errors import ConfigError, HostError
from jaxllm.execution.hosts.executor import HostsExecutor
from jaxllm.execution.hosts.group import HostGroup
from jaxllm.execution.hosts.link import leave_now
from jaxllm.execution.hosts.startup import DEFAULT_TIMEOUT, READY, check_hosts, meet_hosts
from jaxllm.execution.runner import Runner


@contextmanager
def connected_hosts(config: EngineConfig) -> Iterator[HostGroup | None]:
    """The other hosts of a configuration, joined, None where there are none; they end if the body fails.

    Raises:
        ConfigError, HostError: see `check_hosts` and `meet_hosts`.
    """
    check_hosts(config)
    if config.node_rank:
        raise ConfigError(
            f"node_rank={config.node_rank}: the engine runs on host 0. Here run `python -m jaxllm.serve"
            f" --nnodes {config.nnodes} --node-rank {config.node_rank} --master-addr {config.master_addr}`.",
            param="node_rank",
        )
    if config.distributed_executor_backend == "ray":
        # Ray is an extra, and takes a second to import.
        from jaxllm.execution.hosts.ray_cluster import meet_ray_hosts

        group = meet_ray_hosts(config)
    else:
        group = meet_hosts(config) if config.nnodes > 1 else None
    if group is not None:
        group.on_failure(_leave_at_exit)
    try:
        yield group
    except BaseException as error:
        if group is not None:
            group.fail(f"host 0 failed: {type(error).__name__}: {error}")
        raise


def _leave_at_exit(error: HostError) -> None:
    # A thread that waits for a dead host cannot be ended, nor JAX be shut down around it.
    atexit.register(leave_now)


def execute_on_hosts(runner: Runner, hosts: HostGroup, config: EngineConfig) -> None:
    """Has every host do what this runner is told from now on."""
    timeout = config.distributed_timeout_seconds or DEFAULT_TIMEOUT
    compiler = runner.compiler
    ready = hosts.gather(READY, compiler.ready_numbers())
    executor = HostsExecutor(runner.run, compiler.programs, ready, hosts, timeout)
    runner.executor = executor
    compiler.admits = executor.admits
