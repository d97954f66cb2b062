"""Which nodes of a Ray cluster share a model, from what Ray says of them."""

from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxllm.config import EngineConfig
from jaxllm.errors import ConfigError
from jaxllm.execution.hosts.connect import connected_hosts
from jaxllm.execution.hosts.ray_cluster import choose_hosts
from jaxllm.models.families import translate_config
from tests.hosts.processes import ENGINE, Processes
from tests.parallel.models import Oracle, hf_config, write_model


def node(
    name: str, alive: bool = True, labels: dict[str, str] | None = None, **resources: float
) -> dict[str, Any]:
    return {"NodeID": name, "Alive": alive, "Labels": labels or {}, "Resources": {"CPU": 8.0, **resources}}


def slice_node(name: str, number: int, slice_name: str = "pod") -> dict[str, Any]:
    labels = {"ray.io/tpu-slice-name": slice_name, "ray.io/tpu-worker-id": str(number)}
    return node(name, labels=labels, TPU=4.0)


def names(nodes: list[dict[str, Any]], here: str, **config: Any) -> list[str]:
    return [host.node_id for host in choose_hosts(nodes, here, EngineConfig(**config))]


def test_without_accelerators_all_that_live_take_part_this_one_first() -> None:
    nodes = [node("a"), node("b"), node("c", alive=False), node("d")]
    assert names(nodes, "d") == ["d", "a", "b"]
    assert names(nodes, "b", nnodes=2) == ["b", "a"]
    assert choose_hosts(nodes, "a", EngineConfig())[1].resources == {"CPU": 1.0}
    with pytest.raises(ConfigError, match="4 hosts are needed, and the Ray cluster has 3 nodes"):
        names(nodes, "a", nnodes=4)


def test_as_many_nodes_of_a_kind_as_there_are_devices_to_find() -> None:
    nodes = [node("a", GPU=8.0), node("b", GPU=4.0), node("c"), node("d", GPU=8.0), node("e", GPU=8.0)]
    assert names(nodes, "d", tensor_parallel_size=16) == ["d", "a"]
    assert names(nodes, "d", tensor_parallel_size=4) == ["d"]
    assert choose_hosts(nodes, "a", EngineConfig())[0].resources == {"CPU": 1.0, "GPU": 8.0}
    with pytest.raises(ConfigError, match="4 hosts are needed, and the Ray cluster has 3 nodes with 8 GPUs"):
        names(nodes, "a", tensor_parallel_size=32)


def test_a_tpu_slice_takes_part_whole_and_in_its_own_order() -> None:
    nodes = [slice_node("x", 10), slice_node("a", 2), slice_node("z", 0), slice_node("b", 0, "other")]
    assert names(nodes, "z", tensor_parallel_size=12) == ["z", "a", "x"]
    assert choose_hosts(nodes, "z", EngineConfig())[2].resources == {"CPU": 1.0, "TPU": 4.0}
    with pytest.raises(ConfigError, match="This is host 2 of the TPU slice 'pod'"):
        names(nodes, "a")
    with pytest.raises(
        ConfigError, match="2 hosts are needed, and the Ray cluster has 3 hosts of the TPU slice"
    ):
        names(nodes, "z", nnodes=2)


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without_ray(name: str, *arguments: Any, **keywords: Any) -> Any:
        if name.split(".")[0] == "ray":
            raise ImportError("No module named 'ray'")
        return real(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", without_ray)
    with (
        pytest.raises(ConfigError, match=r"needs Ray: pip install 'jaxllm\[ray\]'"),
        connected_hosts(EngineConfig(distributed_executor_backend="ray")),
    ):
        pass


def test_two_nodes_of_a_real_cluster_say_what_one_device_would(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="the extra 'ray' is not installed")
    directory = write_model(tmp_path, "llama", num_hidden_layers=1)
    oracle = Oracle(directory, translate_config(hf_config("llama", num_hidden_layers=1)))
    prompt = np.random.default_rng(0).integers(601, size=21).tolist()
    settings = {**ENGINE, "tensor_parallel_size": 2, "distributed_executor_backend": "ray"}
    params = {"temperature": 0, "max_tokens": 9}
    asked = {"model": str(directory), "settings": settings, "prompts": [prompt], "params": [params]}
    with Processes(tmp_path) as processes:
        processes.start(["-m", "tests.hosts.on_ray", json.dumps(asked)])
        said = json.loads(processes.wait_for_line(0, "SAID ", 300))
        assert said["tokens"] == [[oracle.greedy(prompt, 9)]]
        assert said["commands"] > 9
        assert processes.wait(0, 30) == 0
