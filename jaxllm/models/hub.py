"""From what a user calls a model to the directory that holds it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxllm.config import DEMO_MODEL
from jaxllm.errors import ModelNotFoundError

CONFIG_FILE = "config.json"
GENERATION_CONFIG_FILE = "generation_config.json"
# What a model directory is read for; weights in other formats stay on the hub.
ALLOW_PATTERNS = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.model", "*.tiktoken", "orbax/**")
IGNORE_PATTERNS = ("original/**", "consolidated*.safetensors", "*.onnx*", "onnx/**", "openvino/**")


def resolve_model(
    name: str, revision: str | None = None, download_dir: str | None = None, *, config_only: bool = False
) -> Path:
    """The directory of a model.

    Args:
        name: a directory, "demo" for the bundled model, or a name on the Hugging Face hub, which is
            downloaded, or taken from the cache where the hub cannot be reached.
        revision: branch, tag or commit on the hub; None is the main branch.
        download_dir: where downloads are kept; None is the hub library's own cache.
        config_only: of a model on the hub, nothing but its `config.json` is downloaded.

    Raises:
        ModelNotFoundError: there is no such model, or what is there is not a model's directory.
    """
    if name == DEMO_MODEL and not Path(name).is_dir():
        from jaxllm.demo import demo_model_path

        return Path(demo_model_path())
    path = Path(name).expanduser()
    if name and path.exists():
        return _checked_directory(path)
    if not name or _is_path(name):
        raise ModelNotFoundError(
            f"there is no directory {name!r} (looked for {path.absolute()}); give the directory that "
            "holds the "
            f"model's {CONFIG_FILE}, or a hub name such as 'Qwen/Qwen3-0.6B'"
        )
    patterns = (CONFIG_FILE,) if config_only else ALLOW_PATTERNS
    return _checked_directory(_download(name, revision, download_dir, patterns))


def read_config(path: Path) -> dict[str, Any]:
    """The parsed `config.json` of a model directory.

    Raises:
        ModelNotFoundError: it is missing, or not a JSON object.
    """
    config = _read_json(path / CONFIG_FILE)
    if config is None:
        raise ModelNotFoundError(f"{path} holds no {CONFIG_FILE}; is it the model's directory?")
    return config


def read_config_of(name: str, revision: str | None = None) -> dict[str, Any]:
    """The parsed `config.json` of a model without its weights: that file, a directory with one, "demo", or a
    name on the hub.

    Raises:
        ModelNotFoundError: there is no such model, or its configuration cannot be read.
    """
    file = Path(name).expanduser()
    if not file.is_file():
        return read_config(resolve_model(name, revision, config_only=True))
    config = _read_json(file)
    assert config is not None  # It is a file.
    return config


def read_generation_config(path: Path) -> dict[str, Any]:
    """The parsed `generation_config.json` of a model directory; empty where there is none."""
    return _read_json(path / GENERATION_CONFIG_FILE) or {}


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelNotFoundError(f"{path} is not valid JSON ({error}); download it again") from error
    if not isinstance(value, dict):
        raise ModelNotFoundError(f"{path} holds {type(value).__name__}, not a JSON object; download it again")
    return value


def _is_path(name: str) -> bool:
    """Whether a name can only be meant as a path: the hub knows `name` and `owner/name`."""
    return (
        name.startswith((".", "/", "~", "\\")) or name.count("/") > 1 or name.endswith(("/", ".safetensors"))
    )


def _checked_directory(path: Path) -> Path:
    if not path.is_dir():
        raise ModelNotFoundError(
            f"{path} is a file; give the directory that holds it together with {CONFIG_FILE} and the "
            "tokenizer: "
            f"{path.absolute().parent}"
        )
    if not (path / CONFIG_FILE).is_file():
        names = sorted(entry.name for entry in path.iterdir())
        nested = sorted(entry.parent.name for entry in path.glob(f"*/{CONFIG_FILE}"))
        held = f"it holds {', '.join(names[:6])}" if names else "it is empty"
        hint = f"; the model may be in {path / nested[0]}" if nested else ""
        raise ModelNotFoundError(f"{path} holds no {CONFIG_FILE} ({held}){hint}")
    return path


def _download(name: str, revision: str | None, download_dir: str | None, patterns: Sequence[str]) -> Path:
    # These take a tenth of a second to import, and a local directory does not need them.
    import httpx
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    at = f" at revision {revision!r}" if revision else ""
    cache = download_dir or constants.HF_HUB_CACHE
    otherwise = "or give the path of a directory that holds the model"
    try:
        return Path(
            snapshot_download(
                name,
                revision=revision,
                cache_dir=download_dir,
                allow_patterns=list(patterns),
                ignore_patterns=list(IGNORE_PATTERNS),
            )
        )
    except HFValidationError as error:
        raise ModelNotFoundError(
            f"there is no directory {name!r} here, and it is not a name of the Hugging Face hub "
            f"({error}); give "
            "'owner/name', or the path of a directory that holds the model"
        ) from error
    except GatedRepoError as error:
        raise ModelNotFoundError(
            f"the model {name!r} is on the Hugging Face hub, but its owner grants access by request: "
            "ask for it on "
            f"the model's page and log in with `hf auth login`, {otherwise}"
        ) from error
    except RevisionNotFoundError as error:
        raise ModelNotFoundError(
            f"the model {name!r} on the Hugging Face hub has no revision {revision!r}; leave it out, "
            f"{otherwise}"
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelNotFoundError(
            f"there is no directory {name!r} here and no model {name!r} on the Hugging Face hub (or it "
            "is private "
            f"and you are not logged in); check the spelling, {otherwise}"
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, httpx.HTTPError, OSError) as error:
        reason = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else type(error).__name__
        raise ModelNotFoundError(
            f"there is no directory {name!r} here ({Path(name).absolute()}), the Hugging Face hub "
            "could not be "
            f"asked for {name!r}{at} ({reason}), and the cache {cache} does not hold it; go online "
            f"once, {otherwise}"
        ) from error
