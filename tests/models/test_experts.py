"""Experts from a checkpoint: every one in its place, in either of the ways that they are stored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxllm.convert import convert
from jaxllm.errors import CheckpointError
from jaxllm.models.decoder import parameter_specs
from jaxllm.models.families import translate_config
from jaxllm.models.hub import read_config
from jaxllm.models.loader import load_parameters
from tests.models.checkpoints import write_model
from tests.parity.cases import CASES

HIDDEN = 48
# Block, gate, up and down within a layer, as each family is published.
NAMES = {
    "mixtral": ("block_sparse_moe", "w1", "w3", "w2"),
    "qwen3-moe-mlp-in-the-middle": ("mlp", "gate_proj", "up_proj", "down_proj"),
    "olmoe": ("mlp", "gate_proj", "up_proj", "down_proj"),
}


def router_and_experts(name: str, fused: bool) -> tuple[dict[str, np.ndarray], dict[str, list[np.ndarray]]]:
    """Tensors of the layers that have experts, and the parameters that they are."""
    moe = translate_config(CASES[name].config).moe
    assert moe is not None
    experts, inner = moe.num_experts, moe.intermediate_size
    block, gate, up, down = NAMES[name]
    tensors: dict[str, np.ndarray] = {}
    wanted: dict[str, list[np.ndarray]] = {"router": [], "experts.gate_up": [], "experts.down": []}
    for layer in moe.layers:
        rng = np.random.default_rng(layer)
        router = rng.standard_normal((experts, HIDDEN)).astype(np.float32)
        gates, ups = rng.standard_normal((2, experts, inner, HIDDEN)).astype(np.float32)
        downs = rng.standard_normal((experts, HIDDEN, inner)).astype(np.float32)
        prefix = f"model.layers.{layer}.{'mlp' if fused else block}"
        tensors[f"{prefix}.gate.weight"] = router
        if fused:
            tensors[f"{prefix}.experts.gate_up_proj"] = np.concatenate([gates, ups], axis=1)
            tensors[f"{prefix}.experts.down_proj"] = downs
        else:
            for expert in range(experts):
                tensors[f"{prefix}.experts.{expert}.{gate}.weight"] = gates[expert]
                tensors[f"{prefix}.experts.{expert}.{up}.weight"] = ups[expert]
                tensors[f"{prefix}.experts.{expert}.{down}.weight"] = downs[expert]
        wanted["router"].append(router)
        wanted["experts.gate_up"].append(np.stack([gates, ups]).transpose(0, 1, 3, 2))
        wanted["experts.down"].append(downs.transpose(0, 2, 1))
    return tensors, wanted


def write(directory: Path, name: str, fused: bool, **changes: Any) -> dict[str, list[np.ndarray]]:
    """A whole checkpoint; everything but the experts is as the golden of the case lists it, and zero."""
    from tests.parity.test_goldens import read_golden

    tensors, wanted = router_and_experts(name, fused)
    others = {key: shape for key, shape in read_golden(name)["shapes"].items() if ".experts." not in key}
    others = {
        key: shape for key, shape in others.items() if not key.endswith(f"{NAMES[name][0]}.gate.weight")
    }
    tensors |= {key: np.zeros(shape, np.float32) for key, shape in others.items()}
    for key, value in changes.items():
        del tensors[key]
        tensors |= value
    write_model(directory, tensors, CASES[name].config, num_shards=2)
    return wanted


def load(directory: Path, **options: Any) -> dict[str, Any]:
    config = translate_config(read_config(directory))
    return load_parameters(directory, config, parameter_specs(config), dtype="float32", **options)


@pytest.mark.parametrize("stack_layers", [False, True])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_every_expert_is_in_its_place(name: str, fused: bool, stack_layers: bool, tmp_path: Path) -> None:
    wanted = write(tmp_path, name, fused)
    parameters = load(tmp_path, stack_layers=stack_layers)
    for key, value in wanted.items():
        got = parameters[f"layers.mlp.{key}.weight"]
        assert isinstance(got, jax.Array if stack_layers else list)
        np.testing.assert_array_equal(np.stack(got), np.stack(value), err_msg=key)


def test_a_converted_mixture_is_the_same(tmp_path: Path) -> None:
    name = "qwen3-moe-mlp-in-the-middle"
    wanted = write(tmp_path / "in", name, fused=False)
    convert(str(tmp_path / "in"), tmp_path / "out")
    for stack_layers in (False, True):
        parameters = load(tmp_path / "out", stack_layers=stack_layers)
        for key, value in wanted.items():
            np.testing.assert_array_equal(np.stack(parameters[f"layers.mlp.{key}.weight"]), np.stack(value))


@pytest.mark.parametrize(
    ("fused", "tensor", "instead", "message"),
    [
        (
            False,
            "layers.2.mlp.experts.4.up_proj.weight",
            {},
            r"1 missing: layers\.2\.mlp\.experts\.4\.up_proj",
        ),
        (True, "layers.0.mlp.experts.down_proj", {}, r"1 missing: layers\.0\.mlp\.experts\.down_proj"),
        (
            False,
            "layers.0.mlp.experts.0.down_proj.weight",
            {"model.layers.0.mlp.experts.9.down_proj.weight": np.zeros((HIDDEN, 26), np.float32)},
            r"1 not part of this model: layers\.0\.mlp\.experts\.9",
        ),
        (
            False,
            "layers.1.mlp.experts.3.gate_proj.weight",
            {"model.layers.1.mlp.experts.3.gate_proj.weight": np.zeros((HIDDEN, 26), np.float32)},
            r"experts\.3\.gate_proj\.weight is \[48, 26\], expected \[26, 48\]",
        ),
    ],
)
def test_wrong_experts_are_named(
    fused: bool, tensor: str, instead: dict[str, np.ndarray], message: str, tmp_path: Path
) -> None:
    write(tmp_path, "olmoe", fused, **{f"model.{tensor}": instead})
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path)
