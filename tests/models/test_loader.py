"""Loading: every value in its place, whatever the file's layout, dtype, mesh; and every spoilt file told."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxllm.errors import CheckpointError, ConfigError
from jaxllm.models import checkpoint, placement
from jaxllm.models.config import ModelConfig
from jaxllm.models.decoder import parameter_specs
from jaxllm.models.dummy import dummy_parameters_on_device
from jaxllm.models.families import FAMILIES, translate_config
from jaxllm.models.loader import load_parameters
from jaxllm.models.orbax_checkpoint import save_parameters
from jaxllm.models.safetensors_source import SafetensorsSource
from sharding import make_mesh, named_sharding
from tests.models.checkpoints import DTYPES, LLAMA, llama_tensors, write_model
from tests.models.specs import make_specs
from tests.parity.cases import CASES

CONFIG = translate_config(LLAMA)
SPECS = parameter_specs(CONFIG)


def load(directory: Path, config: ModelConfig = CONFIG, **options: Any) -> dict[str, Any]:
    return load_parameters(directory, config, make_specs(config), **{"dtype": "float32", **options})


def expected(tensors: dict[str, np.ndarray]) -> dict[str, Any]:
    """The parameters of a LLAMA, put together by hand: 2 KV heads of 2 queries each, head_dim 6."""
    parameters: dict[str, Any] = {
        "embed.weight": tensors["model.embed_tokens.weight"],
        "final_norm.weight": tensors["model.norm.weight"],
        "lm_head.weight": tensors["lm_head.weight"],
    }
    layers: dict[str, list[np.ndarray]] = {}
    for layer in range(2):
        t = {
            name.removeprefix(f"model.layers.{layer}."): value
            for name, value in tensors.items()
            if f"layers.{layer}." in name
        }
        q, k, v = (t[f"self_attn.{x}_proj.weight"] for x in "qkv")
        qkv = [
            np.stack([q[12 * head : 12 * head + 6], q[12 * head + 6 : 12 * head + 12],
                      k[6 * head : 6 * head + 6], v[6 * head : 6 * head + 6]])
            for head in range(2)
        ]  # fmt: skip
        o = t["self_attn.o_proj.weight"]
        parts = {
            "layers.attention_norm.weight": t["input_layernorm.weight"],
            "layers.attention.qkv.weight": np.stack(qkv),
            "layers.attention.output.weight": o,
            "layers.mlp_norm.weight": t["post_attention_layernorm.weight"],
            "layers.mlp.gate_up.weight": np.stack([t["mlp.gate_proj.weight"], t["mlp.up_proj.weight"]]),
            "layers.mlp.down.weight": t["mlp.down_proj.weight"],
        }
        for name, value in parts.items():
            layers.setdefault(name, []).append(value)
    return parameters | layers


def assert_same(got: dict[str, Any], want: dict[str, Any], dtype: str = "float32") -> None:
    assert sorted(got) == sorted(want)
    for name, value in want.items():
        stacked = [np.asarray(x) for x in got[name]] if name.startswith("layers.") else np.asarray(got[name])
        np.testing.assert_array_equal(np.stack(stacked), np.stack(value).astype(DTYPES[dtype]), err_msg=name)


@pytest.mark.parametrize("name", CASES)
def test_the_decoder_declares_what_the_design_lists(name: str) -> None:
    config = translate_config(CASES[name].config)
    assert parameter_specs(config) == make_specs(config)


@pytest.mark.parametrize("num_shards", [0, 1, 3])
@pytest.mark.parametrize("stack_layers", [False, True])
def test_every_value_is_in_its_place(tmp_path: Path, num_shards: int, stack_layers: bool) -> None:
    tensors = llama_tensors()
    write_model(tmp_path, tensors, num_shards=num_shards)
    parameters = load(tmp_path, stack_layers=stack_layers)
    assert_same(parameters, expected(tensors))
    assert isinstance(parameters["layers.mlp.down.weight"], jax.Array if stack_layers else list)


@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("wanted", DTYPES)
def test_any_stored_dtype_to_any_other(tmp_path: Path, stored: str, wanted: str) -> None:
    tensors = llama_tensors(dtype=stored)
    write_model(tmp_path, tensors)
    parameters = load(tmp_path, dtype=wanted)
    assert parameters["embed.weight"].dtype == jnp.dtype(wanted)
    assert_same(parameters, expected(tensors), wanted)


@pytest.mark.parametrize("chunk", [1, 100, 1000])
def test_chunks_of_any_size_give_the_same(
    tmp_path: Path, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "_CHUNK_BYTES", chunk)
    tensors = llama_tensors()
    write_model(tmp_path, tensors)
    assert_same(load(tmp_path), expected(tensors))


def test_stacks_that_are_filled_on_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "_shares_host_memory", lambda device: False)
    tensors = llama_tensors()
    write_model(tmp_path, tensors)
    assert_same(load(tmp_path, stack_layers=True, dtype="bfloat16"), expected(tensors), "bfloat16")


def test_shards_without_an_index_and_names_without_the_prefix(tmp_path: Path) -> None:
    tensors = {name.removeprefix("model."): value for name, value in llama_tensors().items()}
    write_model(tmp_path, tensors, num_shards=2)
    (tmp_path / "model.safetensors.index.json").unlink()
    assert_same(load(tmp_path), expected(llama_tensors()))


def test_tensors_that_carry_nothing_are_ignored(tmp_path: Path) -> None:
    tensors = llama_tensors()
    extra = {"model.layers.1.self_attn.rotary_emb.inv_freq": np.ones(3, np.float32)}
    write_model(tmp_path, tensors | extra)
    assert_same(load(tmp_path), expected(tensors))


def test_a_tied_head_may_be_stored_if_it_is_the_same(tmp_path: Path) -> None:
    config = {**LLAMA, "tie_word_embeddings": True}
    tensors = llama_tensors()
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    write_model(tmp_path, tensors, config)
    assert "lm_head.weight" not in load(tmp_path, translate_config(config))
    tensors["lm_head.weight"][-1, -1] += 1
    write_model(tmp_path, tensors, config)
    with pytest.raises(CheckpointError, match=r"two different ones.*'tie_word_embeddings': False"):
        load(tmp_path, translate_config(config))


def spoil_missing(tensors: dict[str, np.ndarray]) -> None:
    del tensors["model.layers.1.mlp.up_proj.weight"]


def spoil_unknown(tensors: dict[str, np.ndarray]) -> None:
    tensors["model.layers.2.mlp.up_proj.weight"] = np.zeros((8, 12), np.float32)


def spoil_shape(tensors: dict[str, np.ndarray]) -> None:
    tensors["model.norm.weight"] = np.zeros(13, np.float32)


def spoil_transposed(tensors: dict[str, np.ndarray]) -> None:
    name = "model.layers.0.mlp.gate_proj.weight"
    tensors[name] = np.ascontiguousarray(tensors[name].T)


def spoil_integer(tensors: dict[str, np.ndarray]) -> None:
    tensors["model.norm.weight"] = np.zeros(12, np.int8)


def spoil_double(tensors: dict[str, np.ndarray]) -> None:
    tensors["norm.weight"] = tensors["model.norm.weight"].copy()


def spoil_head(tensors: dict[str, np.ndarray]) -> None:
    del tensors["lm_head.weight"]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_missing, r"1 missing: layers\.1\.mlp\.up_proj\.weight"),
        (spoil_unknown, r"1 not part of this model: layers\.2\.mlp\.up_proj\.weight"),
        (spoil_shape, r"1 misshapen: norm\.weight is \[13\], expected \[12\]"),
        (spoil_transposed, r"layers\.0\.mlp\.gate_proj\.weight is \[12, 8\], expected \[8, 12\]"),
        (spoil_integer, r"norm\.weight is I8"),
        (spoil_double, r"'norm\.weight' twice, as 'model\.norm\.weight' and 'norm\.weight'|twice"),
        (spoil_head, r"missing: lm_head\.weight.*'tie_word_embeddings': True"),
    ],
)
def test_wrong_tensors_are_named(tmp_path: Path, spoil: Any, message: str) -> None:
    tensors = llama_tensors()
    spoil(tensors)
    write_model(tmp_path, tensors)
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path)


def test_all_problems_come_in_one_message(tmp_path: Path) -> None:
    tensors = llama_tensors()
    spoil_missing(tensors)
    spoil_shape(tensors)
    spoil_unknown(tensors)
    write_model(tmp_path, tensors)
    with pytest.raises(CheckpointError, match=r"1 missing.*1 not part of this model.*1 misshapen"):
        load(tmp_path)


@pytest.mark.parametrize("keep", [0, 4, 7, 8, 100, -1, -1000])
def test_a_truncated_file_is_told_wherever_it_ends(tmp_path: Path, keep: int) -> None:
    write_model(tmp_path, llama_tensors())
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(
        CheckpointError, match=r"model\.safetensors is truncated or corrupt.*download it again"
    ):
        load(tmp_path)


def test_a_corrupt_header_and_trailing_bytes_are_told(tmp_path: Path) -> None:
    write_model(tmp_path, llama_tensors())
    file = tmp_path / "model.safetensors"
    good = file.read_bytes()
    for bad in (b"\xff" * len(good), good[:8] + b"?" + good[9:], good + b"more"):
        file.write_bytes(bad)
        with pytest.raises(CheckpointError, match="truncated or corrupt"):
            load(tmp_path)


def test_a_missing_shard_is_named_with_and_without_index(tmp_path: Path) -> None:
    write_model(tmp_path, llama_tensors(), num_shards=3)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"lacks 1 of the 3 files.*model-00002-of-00003\.safetensors"):
        load(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match=r"lacks 1 of 3 shards: model-00002-of-00003\.safetensors"):
        load(tmp_path)


def test_a_tensor_in_two_shards_is_told(tmp_path: Path) -> None:
    write_model(tmp_path, llama_tensors(), num_shards=2)
    save_file(llama_tensors(), tmp_path / "model-00002-of-00002.safetensors")
    with pytest.raises(CheckpointError, match="is in both model-00001-of-00002"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda index: index["weight_map"].update({"lm_head.weight": "absent.safetensors"}), "absent"),
        (lambda index: index["weight_map"].update({"ghost": "model-00001-of-00002.safetensors"}), "'ghost'"),
        (lambda index: index["weight_map"].update({"ghost": "../x.safetensors"}), "outside its directory"),
        (lambda index: index.pop("weight_map"), "malformed"),
        (lambda index: index.update(weight_map=[]), "malformed"),
    ],
)
def test_an_index_that_does_not_fit_its_files(tmp_path: Path, change: Any, message: str) -> None:
    write_model(tmp_path, llama_tensors(), num_shards=2)
    file = tmp_path / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    change(index)
    file.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path)


def test_an_index_that_is_not_json(tmp_path: Path) -> None:
    write_model(tmp_path, llama_tensors(), num_shards=2)
    (tmp_path / "model.safetensors.index.json").write_text("{")
    with pytest.raises(CheckpointError, match="malformed"):
        load(tmp_path)


def test_torch_files_are_refused_with_the_conversion(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"(?s)pytorch_model\.bin.*save_pretrained"):
        load(tmp_path)
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(CheckpointError, match=r"no \*\.safetensors file"):
        load(tmp_path)


@pytest.mark.parametrize("option", [{"dtype": "int8"}, {"dtype": "float99"}, {"load_format": "bin"}])
def test_options_out_of_range_are_named(tmp_path: Path, option: dict[str, str]) -> None:
    [(name, value)] = option.items()
    with pytest.raises(ConfigError, match=f"{name}='{value}'.*supported") as error:
        load(tmp_path, **option)
    assert error.value.param == name


@pytest.mark.parametrize("stack_layers", [False, True])
def test_dummy_weights(stack_layers: bool) -> None:
    nowhere = Path("/nonexistent")
    one = load(nowhere, load_format="dummy", seed=3, stack_layers=stack_layers)
    again = load(nowhere, load_format="dummy", seed=3)
    other = load(nowhere, load_format="dummy", seed=4)
    assert_same(one, {name: np.asarray(value) for name, value in again.items()})
    for name, spec in SPECS.items():
        values = np.stack(one[name])
        layers = () if spec.num_layers is None else (spec.num_layers,)
        assert values.shape == (*layers, *spec.shape)
        if name.endswith("norm.weight"):
            assert (values == 1).all()
        else:
            assert not np.array_equal(values, np.stack(other[name]))
            assert 0.015 < values.std() < 0.025
            assert abs(values.mean()) < 0.005
    layers = one["layers.mlp.down.weight"]
    assert not np.array_equal(layers[0], layers[1])


@pytest.mark.parametrize("architecture", sorted({c.config["architectures"][0] for c in CASES.values()}))
def test_dummy_weights_of_every_family(architecture: str) -> None:
    case = next(c for c in CASES.values() if c.config["architectures"] == [architecture])
    config = translate_config(case.config)
    parameters = load_parameters(
        Path("/nonexistent"), config, parameter_specs(config), dtype="bfloat16", load_format="dummy"
    )
    for name, value in parameters.items():
        if name.endswith(".bias"):
            assert not np.stack(value).any()


@pytest.mark.parametrize("stack_layers", [False, True])
def test_dummy_weights_made_on_the_device(stack_layers: bool) -> None:
    mesh = make_mesh(devices=jax.devices()[:1])
    shardings = {}
    for name, spec in SPECS.items():
        layered = stack_layers and spec.num_layers is not None
        axes = ("layers", *spec.axes) if layered else spec.axes
        shape = (spec.num_layers, *spec.shape) if layered else spec.shape
        shardings[name] = named_sharding(mesh, axes, shape, name)
    reported: list[int] = []
    parameters = dummy_parameters_on_device(
        SPECS,
        lambda name, array: array,
        shardings,
        jnp.dtype("float32"),
        5,
        stack_layers=stack_layers,
        report=reported.append,
    )
    assert sum(reported) == sum(spec.size for spec in SPECS.values()) * 4
    for name, spec in SPECS.items():
        value = parameters[name]
        assert isinstance(value, list) == (spec.num_layers is not None and not stack_layers)
        values = np.stack(value)
        assert (values == 1).all() if name.endswith("norm.weight") else 0.015 < values.std() < 0.025


@pytest.mark.parametrize("stack_layers", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_orbax_restores_what_was_saved(tmp_path: Path, stack_layers: bool, dtype: str) -> None:
    tensors = llama_tensors()
    write_model(tmp_path / "in", tensors)
    save_parameters(tmp_path, load(tmp_path / "in"))
    parameters = load(tmp_path, stack_layers=stack_layers, dtype=dtype)
    assert list(parameters) == list(make_specs(CONFIG))
    assert_same(parameters, expected(tensors), dtype)
    with pytest.raises(CheckpointError, match="exists already"):
        save_parameters(tmp_path, load(tmp_path / "in"))


def test_orbax_directories_that_do_not_fit_or_are_damaged(tmp_path: Path) -> None:
    write_model(tmp_path / "in", llama_tensors())
    save_parameters(tmp_path, load(tmp_path / "in"))
    deeper = translate_config({**LLAMA, "num_hidden_layers": 3, "vocab_size": 23})
    with pytest.raises(CheckpointError, match=r"embed\.weight is \[22, 12\], expected \[23, 12\]"):
        load(tmp_path, deeper)
    with pytest.raises(CheckpointError, match="no parameters in the layout"):
        load(tmp_path / "in", load_format="orbax")
    (tmp_path / "orbax" / "_METADATA").unlink()
    with pytest.raises(CheckpointError, match="cannot be restored"):
        load(tmp_path)


def test_an_orbax_directory_whose_data_are_gone(tmp_path: Path) -> None:
    write_model(tmp_path / "in", llama_tensors())
    save_parameters(tmp_path, load(tmp_path / "in"))
    for file in (tmp_path / "orbax").rglob("d/*"):
        file.write_bytes(b"")
    # In a process of its own, because Orbax leaves reads behind that complain when it fails.
    code = (
        "import sys; from pathlib import Path; from tests.models.test_loader import load\n"
        "from jaxllm.errors import CheckpointError\n"
        "try: load(Path(sys.argv[1]))\n"
        "except CheckpointError as error: print(error)"
    )
    result = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert "cannot be restored" in result.stdout, result.stderr


def test_the_tables_read_nothing_twice() -> None:
    for name, case in CASES.items():
        config = translate_config(case.config)
        table = FAMILIES[config.architecture].table(config)
        read: Counter[str] = Counter()
        for piece in table.pieces:
            read[piece.tensor] += piece.size
        assert read == {piece.tensor: math.prod(piece.disk_shape) for piece in table.pieces}, name


def write_case(directory: Path, name: str) -> tuple[ModelConfig, dict[str, np.ndarray]]:
    """A checkpoint of random numbers for a case of the parity suite."""
    config = translate_config(CASES[name].config)
    rng, tensors = np.random.default_rng(0), {}
    table = FAMILIES[config.architecture].table(config)
    for piece in (*table.pieces, *table.alternatives[0]):
        for tensor in piece.names:
            tensors[tensor] = rng.standard_normal(piece.disk_shape).astype(np.float32)
    write_model(directory, tensors, CASES[name].config)
    return config, tensors


@pytest.mark.parametrize("stack_layers", [False, True])
def test_what_is_exact_is_so_in_a_model_of_bfloat16(tmp_path: Path, stack_layers: bool) -> None:
    """What DeepSeek-V3 adds to its routers' scores, from a checkpoint and from one of our own."""
    config, tensors = write_case(tmp_path / "in", "deepseek-v3")
    specs, name = parameter_specs(config), "layers.mlp.router.bias"
    assert [key for key, spec in specs.items() if spec.exact] == [name]
    want = [tensors[f"layers.{layer}.mlp.gate.e_score_correction_bias"] for layer in (1, 2)]
    options: dict[str, Any] = {"dtype": "bfloat16", "stack_layers": stack_layers}
    loaded = load_parameters(tmp_path / "in", config, specs, **options)
    apart = load_parameters(tmp_path / "in", config, specs, dtype="bfloat16")
    save_parameters(tmp_path, apart)
    for parameters in (loaded, load_parameters(tmp_path, config, specs, **options)):
        np.testing.assert_array_equal(np.stack(parameters[name]), want)
        assert np.stack(parameters["layers.mlp.router.weight"]).dtype == jnp.bfloat16


def test_parts_of_a_tensor_are_read_where_they_are(tmp_path: Path) -> None:
    """Keys and values of all heads come out of one tensor, whichever part of a parameter is read."""
    config, tensors = write_case(tmp_path, "deepseek-v2-lite")
    specs = parameter_specs(config)
    source = SafetensorsSource(tmp_path, config, specs)
    expanded = tensors["layers.2.self_attn.kv_b_proj.weight"].reshape(4, 10 + 9, 18)
    for name, want in (("key_up", expanded[:, :10]), ("value_up", expanded[:, 10:])):
        assert specs[f"layers.attention.{name}.weight"].shape == want.shape
        for region in (((0, 4), (0, want.shape[1]), (0, 18)), ((1, 3), (2, 7), (4, 5))):
            out = np.empty([stop - start for start, stop in region], np.float32)
            source.read(f"layers.attention.{name}.weight", 2, region, out)
            np.testing.assert_array_equal(out, want[tuple(slice(*bounds) for bounds in region)])
