"""`python -m jaxllm.convert MODEL OUT`: a model in our own layout, restored without translation.

Writes the parameters with Orbax, and copies config, generation config and tokenizer beside them, so
that OUT is a model directory like any other: `LLM(OUT)`, `python -m jaxllm.serve OUT`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxllm.errors import ConfigError, JaxLLMError
from jaxllm.models.decoder import parameter_specs
from jaxllm.models.families import translate_config
from jaxllm.models.hub import CONFIG_FILE, read_config, resolve_model
from jaxllm.models.loader import DTYPES, load_parameters
from jaxllm.models.orbax_checkpoint import is_orbax_checkpoint, save_parameters

# What of a model directory is not its weights; the index of safetensors belongs to them.
_COPIED = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken")
_NOT_COPIED = "*.index.json"


def convert(
    model: str,
    out: Path,
    *,
    dtype: str = "auto",
    revision: str | None = None,
    download_dir: str | None = None,
    hf_overrides: dict[str, Any] | None = None,
    progress: bool = False,
) -> None:
    """Saves a model in our own layout.

    Args:
        model: a directory, a hub name, or "demo".
        out: a directory that does not exist yet, or is empty.
        dtype: of the saved weights; "auto" is what config.json says.
        hf_overrides: fields of config.json to replace, also in the copy.
        progress: show a progress bar.

    Raises:
        ConfigError: `out` holds something already, or an unknown dtype.
        ModelNotFoundError, UnsupportedModelError, CheckpointError: as when loading the model.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists and is not an empty directory; choose another one", param="out")
    source = resolve_model(model, revision, download_dir)
    if is_orbax_checkpoint(source):
        raise ConfigError(f"{source} is in the layout of jaxllm already", param="model")
    if (source / "modules.json").is_file():
        raise ConfigError(
            f"{source} is of sentence-transformers, whose further files and layers (modules.json) are not "
            "converted; serve it as it is, or remove modules.json to convert the transformer alone.",
            param="model",
        )
    hf_config = {**read_config(source), **(hf_overrides or {})}
    config = translate_config(hf_config)
    dtype = config.dtype if dtype == "auto" else dtype
    parameters = load_parameters(source, config, parameter_specs(config), dtype=dtype, progress=progress)

    out.mkdir(parents=True, exist_ok=True)
    save_parameters(out, parameters)
    for pattern in _COPIED:
        for file in source.glob(pattern):
            if not file.match(_NOT_COPIED):
                shutil.copyfile(file, out / file.name)
    # What "auto" means from now on is what has been saved.
    hf_config.pop("torch_dtype", None)
    (out / CONFIG_FILE).write_text(json.dumps({**hf_config, "dtype": dtype}, indent=2) + "\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m jaxllm.convert",
        description="Save a model in jaxllm's own layout, which is restored directly into place.",
    )
    parser.add_argument("model", help="a directory, a Hugging Face hub name, or 'demo'")
    parser.add_argument("out", type=Path, help="directory to make")
    parser.add_argument("--dtype", default="auto", choices=("auto", *DTYPES), help="of the saved weights")
    parser.add_argument("--revision", help="branch, tag or commit on the hub")
    parser.add_argument("--download-dir", help="where downloads are kept")
    parser.add_argument("--hf-overrides", type=json.loads, default={}, help="JSON: fields of config.json")
    parsed = parser.parse_args(arguments)
    try:
        convert(
            parsed.model,
            parsed.out,
            dtype=parsed.dtype,
            revision=parsed.revision,
            download_dir=parsed.download_dir,
            hf_overrides=parsed.hf_overrides,
            progress=True,
        )
    except JaxLLMError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    print(f"saved {parsed.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
