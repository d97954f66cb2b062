"""Loading tokenizers: what it costs to import, what it says when files are wrong, and threads."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from jaxllm.errors import CheckpointError, ConfigError, ModelNotFoundError
from jaxllm.text.tokenizer import get_tokenizer

Zoo = Callable[[str], PreTrainedTokenizerFast]


@pytest.fixture
def directory(zoo: Zoo, tmp_path: Path) -> Path:
    zoo("byte_level").save_pretrained(tmp_path)
    return tmp_path


def test_is_a_hugging_face_tokenizer(zoo: Zoo, directory: Path) -> None:
    tokenizer = get_tokenizer(directory)
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    for text in ("hello 世界", "", "<s>hello</s>"):
        assert tokenizer.encode(text) == zoo("byte_level").encode(text)
        assert tokenizer.decode(tokenizer.encode(text)) == zoo("byte_level").decode(tokenizer.encode(text))
    assert tokenizer.eos_token_id == zoo("byte_level").eos_token_id
    assert get_tokenizer(str(directory)).get_vocab() == tokenizer.get_vocab()


def test_does_not_import_what_is_slow_to_import(directory: Path) -> None:
    code = (
        "import sys; from jaxllm.text.tokenizer import get_tokenizer; "
        "assert not any(m.startswith('transformers') for m in sys.modules); "
        f"get_tokenizer({str(directory)!r}).encode('hello'); "
        "heavy = {'torch', 'jax', 'transformers.models.auto', 'transformers.modeling_utils'}; "
        "heavy &= set(sys.modules); "
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_class_defaults_come_from_auto_tokenizer(directory: Path) -> None:
    """GPT-2's published files name no end-of-sequence token."""
    (directory / "tokenizer_config.json").write_text('{"model_max_length": 1024}')
    (directory / "config.json").write_text('{"model_type": "gpt2"}')
    data = json.loads((directory / "tokenizer.json").read_text())
    data["added_tokens"].append(
        {**data["added_tokens"][0], "id": len(data["model"]["vocab"]) + 2, "content": "<|endoftext|>"}
    )
    (directory / "tokenizer.json").write_text(json.dumps(data))
    assert get_tokenizer(directory).eos_token == "<|endoftext|>"


def test_saves_under_the_name_of_its_class(directory: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    get_tokenizer(directory).save_pretrained(out)
    name = json.loads((out / "tokenizer_config.json").read_text())["tokenizer_class"]
    assert name == PreTrainedTokenizerFast.__name__
    assert get_tokenizer(out).encode("hello") == get_tokenizer(directory).encode("hello")


def test_copies_and_pickles(directory: Path) -> None:
    tokenizer = get_tokenizer(directory)
    for other in (copy.deepcopy(tokenizer), pickle.loads(pickle.dumps(tokenizer))):
        assert other.encode("hello 世界") == tokenizer.encode("hello 世界")
        assert type(other).__name__ == type(tokenizer).__name__


def test_threads_do_not_truncate_each_other(directory: Path) -> None:
    tokenizer = get_tokenizer(directory)
    text = "hello world " * 20
    full = tokenizer.encode(text)
    wrong: list[object] = []

    def work(truncate: bool) -> None:
        options = {"truncation": True, "max_length": 10} if truncate else {}
        try:
            for _ in range(500):
                ids = tokenizer.encode(text, **options)
                if ids != (full[:10] if truncate else full):
                    wrong.append(len(ids))
                tokenizer.decode(ids)
        except Exception as error:  # a thread's error must fail the test
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(i % 2 == 1,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


class TestErrors:
    def test_no_such_directory(self, tmp_path: Path) -> None:
        for name in (tmp_path / "nothing", "./nothing", "a/b/c", ""):
            with pytest.raises(ModelNotFoundError, match="no such directory"):
                get_tokenizer(name)

    def test_unknown_hub_name_offline(self, tmp_path: Path) -> None:
        with pytest.raises(
            ModelNotFoundError, match=r"'nobody/nothing' at revision 'v1'.*path of a directory"
        ):
            get_tokenizer("nobody/nothing", revision="v1", download_dir=str(tmp_path))

    def test_a_file(self, directory: Path) -> None:
        with pytest.raises(ConfigError, match="is a file"):
            get_tokenizer(directory / "tokenizer.json")

    def test_no_tokenizer_files(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text("{}")
        with pytest.raises(ModelNotFoundError, match=r"tokenizer\.json.*skip_tokenizer_init"):
            get_tokenizer(tmp_path)

    @pytest.mark.parametrize("damage", ["truncated", "empty", "not a tokenizer"])
    def test_corrupt_tokenizer(self, directory: Path, damage: str) -> None:
        file = directory / "tokenizer.json"
        content = file.read_text()
        file.write_text({"truncated": content[: len(content) // 2], "empty": ""}.get(damage, '{"a": 1}'))
        with pytest.raises(CheckpointError, match=r"tokenizer.json \(\d+ bytes\).*fetch it again"):
            get_tokenizer(directory)

    @pytest.mark.parametrize("content", ["{", "[]"])
    def test_corrupt_config(self, directory: Path, content: str) -> None:
        (directory / "tokenizer_config.json").write_text(content)
        with pytest.raises(CheckpointError, match=r"tokenizer_config\.json"):
            get_tokenizer(directory)

    def test_code_of_its_own(self, directory: Path) -> None:
        config = {"auto_map": {"AutoTokenizer": ["own.Own", None]}, "tokenizer_class": "Own"}
        (directory / "tokenizer_config.json").write_text(json.dumps(config))
        (directory / "tokenizer.json").unlink()
        (directory / "vocab.txt").write_text("a")
        shutil.copy(__file__, directory / "own.py")
        with pytest.raises(ConfigError, match="trust_remote_code=True") as caught:
            get_tokenizer(directory)
        assert caught.value.param == "trust_remote_code"
