"""How the hosts of a model find each other, and agree on what they run, before JAX joins them."""

from __future__ import annotations

import hashlib
import logging
import socket
from collections.abc import Callable, Sequence
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any, Protocol

import jax

import jaxllm
from jaxllm.config import EngineConfig
from jaxllm.errors import ConfigError, HostError
from jaxllm.execution.batch import Program
from jaxllm.execution.hosts.group import HostGroup, await_hosts
from jaxllm.execution.hosts.link import HostLink, connect
from jaxllm.models.config import ModelConfig
from sharding import ShardingError, join_hosts

logger = logging.getLogger(__name__)

DEFAULT_TIMEOUT = 600
# What hosts tell one another last before the first command: the steps that they have compiled.
READY = "steps that are ready"

# What each host may have a value of its own for: where things lie there, and how it is reached.
_OWN = frozenset(
    (
        "model",
        "tokenizer",
        "download_dir",
        "compilation_cache_dir",
        "record_schedule",
        "record_trace",
        "disable_log_stats",
        "node_rank",
        "nnodes",
        "master_addr",
        "master_port",
        "distributed_executor_backend",
        "distributed_timeout_seconds",
    )
)


class Hosts(Protocol):
    """The hosts that share a model, as any one of them sees the others."""

    def gather(self, name: str, value: Any) -> list[Any]:
        """What every host has to say about something, host 0 first; waits for all of them."""


def check_hosts(config: EngineConfig) -> None:
    """Refuses what contradicts itself about hosts.

    Raises:
        ConfigError: with the field and what is allowed.
    """
    for name, least in (("nnodes", 1), ("node_rank", 0), ("distributed_timeout_seconds", 1)):
        value = getattr(config, name)
        if value is not None and value < least:
            raise ConfigError(f"{name}={value} must be at least {least}.", param=name)
    if config.node_rank >= config.nnodes:
        raise ConfigError(
            f"node_rank={config.node_rank}: with nnodes={config.nnodes} hosts are numbered from 0 to"
            f" {config.nnodes - 1}.",
            param="node_rank",
        )
    # JAX's own coordinator has the next one.
    if not 0 < config.master_port < 65535:
        raise ConfigError(
            f"master_port={config.master_port}: ports are in [1, 65534], and the next one is taken, too.",
            param="master_port",
        )
    if config.distributed_executor_backend == "uni" and config.nnodes > 1:
        raise ConfigError(
            f"distributed_executor_backend='uni' is one process, and nnodes={config.nnodes}; leave it out.",
            param="distributed_executor_backend",
        )


def meet_hosts(
    config: EngineConfig,
    listener: socket.socket | None = None,
    check_coming: Callable[[], str | None] = lambda: None,
) -> HostGroup:
    """Waits on host 0 for the others, and joins them; nothing may have been done with JAX before.

    Args:
        listener: bound to master_addr and master_port already.
        check_coming: says why a host will not come, or None; asked while some are missing.

    Raises:
        ConfigError, HostError: a host that does not come, comes with other settings, or cannot join.
    """
    timeout = config.distributed_timeout_seconds or DEFAULT_TIMEOUT
    with listener or _listen(config) as bound:
        settings = asdict(config)

        def check_hello(hello: dict[str, Any]) -> str | None:
            if hello.get("versions") != _versions():
                return f"host {hello['host']} runs {hello.get('versions')}, and host 0 {_versions()}"
            if hello.get("nnodes") != config.nnodes:
                return f"host {hello['host']} has nnodes={hello.get('nnodes')}, and host 0 {config.nnodes}"
            for name, value in hello.get("settings", {}).items():
                if name in settings and settings[name] != value:
                    return f"host {hello['host']} has {name}={value!r}, and host 0 {settings[name]!r}"
            return None

        group = await_hosts(bound, config.nnodes, timeout, check_hello, {"settings": settings}, check_coming)
    try:
        _join(config, timeout)
    except BaseException as error:
        group.fail(f"host 0 failed: {error}")
        raise
    return group


def follow_host_0(config: EngineConfig) -> tuple[HostLink, EngineConfig]:
    """Finds host 0 from another host, and joins it.

    Returns:
        The link, and the configuration that host 0 has, with what is this host's own.

    Raises:
        ConfigError, HostError: as `meet_hosts`.
    """
    timeout = config.distributed_timeout_seconds or DEFAULT_TIMEOUT
    given = {field.name: getattr(config, field.name) for field in fields(config)}
    changed = {f.name: given[f.name] for f in fields(config) if given[f.name] != _default(f)}
    hello = {
        "versions": _versions(),
        "nnodes": config.nnodes,
        "settings": {name: value for name, value in changed.items() if name not in _OWN},
    }
    link = connect(config.master_addr, config.master_port, config.node_rank, hello, timeout)
    own = {name: value for name, value in changed.items() if name in _OWN}
    shared = {name: value for name, value in link.welcome["settings"].items() if name not in own}
    # Host 0 keeps the records, and is reached as this host reaches it.
    kept = {name: given[name] for name in ("node_rank", "nnodes", "master_addr", "master_port")}
    merged = EngineConfig(**{**shared, **own, **kept, "record_schedule": None, "record_trace": None})
    try:
        _join(merged, timeout)
    except Exception as error:
        link.fail(error)
    return link, merged


def agree_on_model(
    hosts: Hosts, config: EngineConfig, model: ModelConfig, path: Path, programs: Sequence[Program]
) -> None:
    """Makes sure that every host has the same before any of it is run.

    Args:
        config: resolved.
        path: the model's directory on this host.

    Raises:
        HostError: a host differs; names it, and in what.
    """
    limits = {name: value for name, value in asdict(config).items() if name not in _OWN}
    files = sorted((file.name, file.stat().st_size) for file in path.glob("*.safetensors"))
    mine = {
        "configuration": _digest(limits),
        "model": _digest(model),
        "weight files": _digest(files),
        "steps": _digest(list(programs)),
        "kind of device": jax.local_devices()[0].device_kind,
    }
    everyone = hosts.gather("what they run", mine)
    for host, theirs in enumerate(everyone):
        different = [name for name, value in theirs.items() if value != everyone[0][name]]
        if different:
            raise HostError(
                f"host {host} has another {', another '.join(different)} than host 0; give every host the"
                " same model and the same software"
            )


def _default(field: Any) -> Any:
    return field.default if field.default is not MISSING else field.default_factory()


def _join(config: EngineConfig, timeout: int) -> None:
    address = f"[{config.master_addr}]" if ":" in config.master_addr else config.master_addr
    address = f"{address}:{config.master_port + 1}"
    try:
        join_hosts(address, config.nnodes, config.node_rank, timeout=timeout)
    except ShardingError as error:
        raise ConfigError(f"The hosts could not be joined: {error}.", param="nnodes") from error


def _listen(config: EngineConfig) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in config.master_addr else socket.AF_INET
        return socket.create_server((config.master_addr, config.master_port), family=family)
    except OSError as error:
        raise ConfigError(
            f"Host 0 cannot listen on {config.master_addr}:{config.master_port}: {error.strerror or error}."
            " master_addr is an address of host 0 that the other hosts reach, and master_port is free there.",
            param="master_addr",
        ) from error


def _versions() -> dict[str, str]:
    return {"jaxllm": jaxllm.__version__, "jax": jax.__version__}


def _digest(value: object) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()
