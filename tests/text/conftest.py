"""Small tokenizers of every kind that real models come with, built here."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

TEXT = [
    "hello world, this is a small text to learn from. ",
    "héllo wörld 世界 こんにちは 😀😀 👩‍👩‍👧 naïve café\n\ttab  two spaces",
    "def f(x): return x + 1  # comment",
] * 5
SPECIAL = ["<s>", "</s>", "<|im_start|>"]


def _bpe(vocab_size: int, *, alphabet: list[str], extra: list[str] = []) -> trainers.BpeTrainer:  # noqa: B006
    return trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=SPECIAL + extra, initial_alphabet=alphabet, show_progress=False
    )


def byte_level() -> Tokenizer:
    """GPT-2, Llama 3, Qwen: every byte is a character of the vocabulary."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(TEXT, _bpe(380, alphabet=pre_tokenizers.ByteLevel.alphabet()))
    # An added token may hold characters outside the byte alphabet (the space) or inside it (é).
    tokenizer.add_tokens([AddedToken("<tool call>", special=False), AddedToken("né", special=False)])
    return tokenizer


def metaspace(prepend_scheme: str) -> Tokenizer:
    """T5-like."""
    tokenizer = Tokenizer(models.BPE(unk_token="<s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend_scheme)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=prepend_scheme)
    tokenizer.train_from_iterator(TEXT, _bpe(300, alphabet=[]))
    return tokenizer


def byte_fallback(*, strips: bool) -> Tokenizer:
    """Llama 2 and Mistral (which strip the leading space), Gemma (which does not)."""
    tokenizer = Tokenizer(models.BPE(unk_token="<s>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always" if strips else "never")
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer.train_from_iterator(["hello world this is text"] * 5, _bpe(330, alphabet=[], extra=bytes_))
    parts: list[decoders.Decoder] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if strips:
        parts.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(parts)
    # The trainer made specials of the byte tokens; real vocabularies have them as plain tokens.
    state = tokenizer.to_str()
    import json

    data = json.loads(state)
    data["added_tokens"] = [token for token in data["added_tokens"] if token["content"] in SPECIAL]
    return Tokenizer.from_str(json.dumps(data))


def unigram() -> Tokenizer:
    """ALBERT-, XLNet-like."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.train_from_iterator(
        TEXT,
        trainers.UnigramTrainer(vocab_size=150, special_tokens=SPECIAL, unk_token="<s>", show_progress=False),
    )
    return tokenizer


def word_piece() -> Tokenizer:
    """BERT-like: pieces inside a word begin with ##, and the decoder cleans spaces up."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="<s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=150, special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator(TEXT, trainer)
    return tokenizer


def word_level() -> Tokenizer:
    """No decoder at all: tokens are joined by spaces."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="<s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(
        TEXT, trainers.WordLevelTrainer(special_tokens=SPECIAL, show_progress=False)
    )
    return tokenizer


def bpe_suffix() -> Tokenizer:
    """GPT-1-like: `</w>` ends a word, and the last word of a text has no space behind it."""
    tokenizer = Tokenizer(models.BPE(unk_token="<s>", end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.BPEDecoder()
    trainer = trainers.BpeTrainer(
        vocab_size=200, special_tokens=SPECIAL, end_of_word_suffix="</w>", show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return tokenizer


_BUILDERS: dict[str, Callable[[], Tokenizer]] = {
    "byte_level": byte_level,
    "metaspace_always": lambda: metaspace("always"),
    "metaspace_first": lambda: metaspace("first"),
    "metaspace_never": lambda: metaspace("never"),
    "llama2": lambda: byte_fallback(strips=True),
    "gemma": lambda: byte_fallback(strips=False),
    "unigram": unigram,
    "word_piece": word_piece,
    "word_level": word_level,
    "bpe_suffix": bpe_suffix,
}


@cache
def _build(name: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=_BUILDERS[name](),
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )


@pytest.fixture(scope="session")
def zoo() -> Callable[[str], PreTrainedTokenizerFast]:
    """Hugging Face tokenizers by the name of their kind."""
    return _build
