"""What keeps hosts from being joined, or from taking part."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from sharding import ShardingError, check_every_host_takes_part, join_hosts, leave_hosts


def test_hosts_are_joined_before_jax_is_used() -> None:
    jax.devices()
    with pytest.raises(ShardingError, match="JAX has been used in this process already"):
        join_hosts("127.0.0.1:1", 2, 0, timeout=1)
    assert not jax.distributed.is_initialized()
    leave_hosts()  # Nobody was joined.


def mesh_of(*processes: int) -> Any:
    devices = np.array([SimpleNamespace(process_index=process) for process in processes])
    return SimpleNamespace(devices=devices, size=len(processes))


def test_a_host_without_a_device_in_the_mesh_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    check_every_host_takes_part(mesh_of(0, 0))
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    check_every_host_takes_part(mesh_of(0, 1, 2, 3, 3))
    with pytest.raises(ShardingError, match="a mesh of 3 devices has none of host 1, 3"):
        check_every_host_takes_part(mesh_of(0, 2, 2))
