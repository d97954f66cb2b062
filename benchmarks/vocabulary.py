"""A large vocabulary without a download: what Python's own library is written in, as byte-level BPE."""

from __future__ import annotations

import re
import sysconfig
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

EOS = "<|end|>"
_PIECES = re.compile(r"\d{1,3}| ?[^\W\d_]+|\s+| ?[^\w\s]+|_+")


def large_tokenizer(vocab_size: int, files: Sequence[Path] | None = None) -> PreTrainedTokenizerFast:
    """A tokenizer of exactly so many tokens.

    Tokens are the most frequent beginnings of words, which merges of one more character each make: as many
    short and long, spaced and punctuated ones as real vocabularies have, though not the same.

    Args:
        files: to take the words from; None is Python's library.

    Raises:
        ValueError: they do not have that many.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    words: Counter[str] = Counter()
    if files is None:
        everything = sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py"))
        files = [file for file in everything if "site-packages" not in file.parts]
    for file in files:
        words.update(_PIECES.findall(file.read_text("utf-8", "ignore")))
    beginnings: Counter[str] = Counter()
    for word, count in words.items():
        [(spelt, _)] = to_bytes.pre_tokenize_str(word)
        for end in range(2, min(len(spelt), 16) + 1):
            beginnings[spelt[:end]] += count
    wanted = vocab_size - len(alphabet) - 1
    # A beginning is as frequent as what it begins, so that a merge's left side is there before it.
    chosen = sorted(beginnings, key=lambda text: (-beginnings[text], len(text), text))[:wanted]
    if len(chosen) < wanted:
        raise ValueError(f"vocab_size must be at most {vocab_size - wanted + len(chosen)}; got {vocab_size}")
    vocabulary = {text: i for i, text in enumerate([*alphabet, *chosen])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[(text[:-1], text[-1]) for text in chosen]))
    split = pre_tokenizers.Split(Regex(_PIECES.pattern), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(EOS, special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=EOS)
