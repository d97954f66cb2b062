"""Loading a tokenizer: a Hugging Face one, at the smallest start-up cost.

A directory with a complete `tokenizer.json` is loaded by `PreTrainedTokenizerFast`, whose import takes
about 0.6 s; only what needs more than that (slow tokenizers, vocabularies without `tokenizer.json`,
code of the checkpoint's own) goes through `AutoTokenizer`, whose import takes 2 to 3 s.
"""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxllm.errors import CheckpointError, ConfigError, ModelNotFoundError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"

# Any of these holds a vocabulary; the first one is all that a fast tokenizer needs.
_VOCABULARY_FILES = (
    TOKENIZER_FILE,
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tiktoken.model",
    "tekken.json",
)
_DOWNLOADED_FILES = (
    "tokenizer*",
    "*.model",
    "*.tiktoken",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "tekken.json",
    "config.json",
)


def get_tokenizer(
    path_or_name: str | Path,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    download_dir: str | None = None,
) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a model.

    The result is a Hugging Face tokenizer that several threads may use at once, also with truncation
    and padding, which Hugging Face keeps as state of the tokenizer.

    Args:
        path_or_name: a directory, or the name of a repository on the Hugging Face hub.
        revision: branch, tag or commit of the repository.
        trust_remote_code: run Python code that comes with the tokenizer, where it has any.
        download_dir: where repositories are kept, instead of Hugging Face's cache.

    Raises:
        ModelNotFoundError: there is no such directory or repository, or it holds no tokenizer.
        CheckpointError: a tokenizer file is corrupt or truncated.
        ConfigError: the tokenizer needs `trust_remote_code` or a package that is not installed.
    """
    directory = _directory(path_or_name, revision, trust_remote_code, download_dir)
    if not _holds_tokenizer(directory, trust_remote_code):
        raise ModelNotFoundError(
            f"No tokenizer in {directory}: looked for {', '.join(_VOCABULARY_FILES)}. Pass tokenizer= with a "
            "directory or hub name that has one, or skip_tokenizer_init=True to work with token ids only."
        )
    config = _read_config(directory)
    try:
        tokenizer = _load(directory, config, trust_remote_code)
    except ImportError as error:
        raise ConfigError(
            f"The tokenizer in {directory} needs a package that is not installed: {error}", param="tokenizer"
        ) from error
    except Exception as error:  # the tokenizers library raises bare Exception
        if "trust_remote_code" in str(error):
            raise ConfigError(
                f"The tokenizer in {directory} comes with Python code of its own. Read that code, and pass "
                "trust_remote_code=True if you want to run it.",
                param="trust_remote_code",
            ) from error
        present = sorted(file.name for file in directory.iterdir() if file.name in _VOCABULARY_FILES)
        sizes = ", ".join(f"{name} ({(directory / name).stat().st_size} bytes)" for name in present)
        raise CheckpointError(
            f"Cannot load the tokenizer in {directory} from {sizes or TOKENIZER_CONFIG_FILE}: {error}. "
            "A file may be corrupt or truncated: fetch it again, or pass tokenizer= with another directory."
        ) from error
    return _thread_safe(tokenizer)


def _holds_tokenizer(directory: Path, trust_remote_code: bool) -> bool:
    names = {file.name for file in directory.iterdir()}
    if names & set(_VOCABULARY_FILES) or any(name.endswith(".tiktoken") for name in names):
        return True
    # A tokenizer class of the checkpoint's own may keep its vocabulary under any name.
    return trust_remote_code and TOKENIZER_CONFIG_FILE in names


def _directory(
    path_or_name: str | Path, revision: str | None, trust_remote_code: bool, download_dir: str | None
) -> Path:
    """The local directory of a tokenizer, downloaded if need be."""
    path = Path(path_or_name).expanduser()
    if path.is_dir() and path_or_name != "":  # which Path takes for the current directory
        return path
    if path.is_file():
        raise ConfigError(
            f"tokenizer={str(path_or_name)!r} is a file; pass the directory that holds it ({path.parent}).",
            param="tokenizer",
        )
    name = str(path_or_name)
    if isinstance(path_or_name, Path) or name.startswith((".", "/", "~")) or name.count("/") > 1 or not name:
        raise ModelNotFoundError(
            f"No tokenizer at {name!r}: there is no such directory. Pass an existing directory, or the name "
            "of a repository on the Hugging Face hub, such as 'organisation/model'."
        )

    from huggingface_hub import snapshot_download

    patterns = [*_DOWNLOADED_FILES, *(["*.py"] if trust_remote_code else [])]
    try:
        return Path(
            snapshot_download(name, revision=revision, cache_dir=download_dir, allow_patterns=patterns)
        )
    except Exception as error:  # network, authorization, and name errors share no base class
        kept = f" and in {download_dir}" if download_dir else ""
        at = f" at revision {revision!r}" if revision else ""
        raise ModelNotFoundError(
            f"No tokenizer {name!r}{at}: there is no such directory under {Path.cwd()}, and the Hugging Face "
            f"hub (with its local cache{kept}) did not give it: {_first_line(error)} Check the name and the "
            "network, or pass the path of a directory that you have already downloaded."
        ) from error


def _first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    line = text.splitlines()[0].strip()
    return line if line.endswith((".", "!")) else f"{line}."


def _read_config(directory: Path) -> dict[str, Any]:
    file = directory / TOKENIZER_CONFIG_FILE
    if not file.is_file():
        return {}
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{file} is not valid JSON: {error}. Fetch the file again.") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{file} must hold a JSON object, not a {type(config).__name__}.")
    return config


def _load(directory: Path, config: dict[str, Any], trust_remote_code: bool) -> PreTrainedTokenizerBase:
    if _is_self_contained(directory, config, trust_remote_code):
        from transformers import PreTrainedTokenizerFast

        fast: PreTrainedTokenizerBase = PreTrainedTokenizerFast.from_pretrained(directory)
        return fast
    from transformers import AutoTokenizer

    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
        directory, trust_remote_code=trust_remote_code
    )
    return tokenizer


def _is_self_contained(directory: Path, config: dict[str, Any], trust_remote_code: bool) -> bool:
    """Whether `tokenizer.json` and the special tokens named beside it are the whole tokenizer.

    Where no end-of-sequence token is named it is a default of the tokenizer's class (GPT-2), which only
    `AutoTokenizer` knows.
    """
    if not (directory / TOKENIZER_FILE).is_file():
        return False
    if "auto_map" in config and trust_remote_code:
        return False
    return "eos_token" in config or (directory / "special_tokens_map.json").is_file()


def _thread_safe(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Makes encoding a critical section.

    Truncation and padding are set on the tokenizer before it encodes, so that without a lock a call
    that truncates also cuts the text of a call in another thread.
    """
    if hasattr(type(tokenizer), "_encode_plus"):
        tokenizer.__class__ = _locked_class(type(tokenizer))
    return tokenizer


def _locked_class(base: Any) -> Any:
    lock = threading.RLock()

    class Locked(base):
        def _encode_plus(self, *args: Any, **kwargs: Any) -> Any:
            with lock:
                return super()._encode_plus(*args, **kwargs)

        def __reduce_ex__(self, protocol: Any) -> Any:
            # This class cannot be imported by name: a copy, or another process, makes its own.
            _, _, *state = super().__reduce_ex__(protocol)
            return (_new_locked, (base,), *state)

    # save_pretrained writes the name of the class.
    Locked.__name__, Locked.__qualname__ = base.__name__, base.__qualname__
    Locked.__module__, Locked.__doc__ = base.__module__, base.__doc__
    return Locked


def _new_locked(base: Any) -> PreTrainedTokenizerBase:
    locked: Any = _locked_class(base)
    instance: PreTrainedTokenizerBase = locked.__new__(locked)
    return instance
