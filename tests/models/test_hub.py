"""From what a user types to a model directory, without a network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import huggingface_hub
import pytest
from huggingface_hub import errors

from jaxllm.errors import ModelNotFoundError
from jaxllm.models.hub import read_config, read_generation_config, resolve_model
from tests.models.checkpoints import llama_tensors, write_model


def test_a_directory_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_model(tmp_path / "model", llama_tensors())
    assert resolve_model(str(tmp_path / "model")) == tmp_path / "model"
    monkeypatch.chdir(tmp_path)
    assert resolve_model("model") == Path("model")
    assert resolve_model("./model") == Path("model")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_model("~/model") == tmp_path / "model"


def test_a_file_in_place_of_a_directory(tmp_path: Path) -> None:
    write_model(tmp_path, llama_tensors())
    with pytest.raises(ModelNotFoundError, match=f"is a file; give the directory.*{tmp_path}"):
        resolve_model(str(tmp_path / "model.safetensors"))


def test_directories_that_hold_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"no config\.json \(it is empty\)"):
        resolve_model(str(tmp_path))
    (tmp_path / "weights.txt").write_text("x")
    write_model(tmp_path / "inner", llama_tensors())
    with pytest.raises(ModelNotFoundError, match=r"it holds inner, weights\.txt.*may be in .*inner"):
        resolve_model(str(tmp_path))


@pytest.mark.parametrize(
    "name", ["./absent", "/absent/model", "~/absent", "a/b/c", "", "absent/", "x.safetensors"]
)
def test_paths_that_do_not_exist_never_reach_the_hub(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: pytest.fail("asked the hub"))
    with pytest.raises(ModelNotFoundError, match="there is no directory"):
        resolve_model(name)


def test_offline_says_what_was_looked_for_and_where(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError) as error:
        resolve_model("owner/absent-model", download_dir=str(tmp_path))
    message = str(error.value)
    for part in ("'owner/absent-model'", str(tmp_path), "HF_HUB_OFFLINE", "path of a directory"):
        assert part in message


def response(status: int) -> httpx.Response:
    return httpx.Response(status, request=httpx.Request("GET", "https://example.org"))


@pytest.mark.parametrize(
    ("raised", "message"),
    [
        (
            errors.RepositoryNotFoundError("x", response=response(404)),
            "no model 'owner/name'.*check the spelling",
        ),
        (errors.RevisionNotFoundError("x", response=response(404)), "no revision 'v9'"),
        (errors.GatedRepoError("x", response=response(403)), "hf auth login"),
        (errors.HfHubHTTPError("x", response=response(500)), "could not be asked"),
        (errors.LocalEntryNotFoundError("x"), "could not be asked"),
        (httpx.ConnectError("refused"), "could not be asked"),
        (errors.HFValidationError("bad name"), "not a name of the Hugging Face hub"),
    ],
)
def test_what_the_hub_answers_becomes_one_error(
    raised: Exception, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any, **options: Any) -> str:
        raise raised

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(ModelNotFoundError, match=message) as error:
        resolve_model("owner/name", revision="v9")
    assert error.value.__cause__ is raised


def test_a_hub_name_is_downloaded_with_what_is_read_and_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_model(tmp_path, llama_tensors())
    seen: dict[str, Any] = {}

    def download(name: str, **options: Any) -> str:
        seen.update(options, name=name)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve_model("owner/name", revision="v1", download_dir="/cache") == tmp_path
    assert (seen["name"], seen["revision"], seen["cache_dir"]) == ("owner/name", "v1", "/cache")
    from huggingface_hub.utils import filter_repo_objects

    files = [
        "config.json",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.model",
        "chat_template.jinja",
        "merges.txt",
        "pytorch_model.bin",
        "original/consolidated.00.pth",
        "original/params.json",
        "consolidated.safetensors",
        "onnx/model.onnx",
    ]
    kept = filter_repo_objects(
        files, allow_patterns=seen["allow_patterns"], ignore_patterns=seen["ignore_patterns"]
    )
    assert list(kept) == files[:6]


def test_a_cached_snapshot_is_used_offline(tmp_path: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    root = tmp_path / "models--owner--name"
    write_model(root / "snapshots" / commit, llama_tensors())
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(commit)
    assert resolve_model("owner/name", download_dir=str(tmp_path)) == root / "snapshots" / commit


def test_the_demo_is_bundled_unless_a_directory_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundled = resolve_model("demo")
    assert read_config(bundled)["architectures"]
    write_model(tmp_path / "demo", llama_tensors())
    monkeypatch.chdir(tmp_path)
    assert resolve_model("demo") == Path("demo")


def test_configs_are_read_or_told(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"holds no config\.json"):
        read_config(tmp_path)
    assert read_generation_config(tmp_path) == {}
    (tmp_path / "generation_config.json").write_text(json.dumps({"top_k": 3}))
    assert read_generation_config(tmp_path) == {"top_k": 3}
    for bad, message in (("{", "not valid JSON"), ("[1]", "holds list"), ("\xff", "not valid JSON")):
        (tmp_path / "config.json").write_text(bad, encoding="latin-1")
        with pytest.raises(ModelNotFoundError, match=message):
            read_config(tmp_path)
