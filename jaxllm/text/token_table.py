"""What each token adds to a text, for tokenizers where that does not depend on its neighbours."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

import tokenizers

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True, slots=True)
class TableScheme:
    """How a decoder whose tokens do not depend on their neighbours treats a token.

    Attributes:
        byte_level: characters stand for bytes, by GPT-2's alphabet.
        byte_fallback: tokens like `<0xE4>` stand for one byte.
        first_differs: the very first token of a text is decoded differently (Metaspace).
        strip: character removed from the start of a text, "" for none, and how often at most.
    """

    byte_level: bool = False
    byte_fallback: bool = False
    first_differs: bool = False
    strip: str = ""
    strip_count: int = 0


def table_scheme(backend: tokenizers.Tokenizer) -> TableScheme | None:
    """The scheme of a tokenizer's decoder; None where tokens depend on their neighbours."""
    if backend.decoder is None:
        return None
    parts = _flatten(json.loads(backend.decoder.__getstate__()))
    names = [part["type"] for part in parts]
    if names == ["ByteLevel"]:
        return TableScheme(byte_level=True)
    if names == ["Metaspace"]:
        return TableScheme(first_differs=parts[0].get("prepend_scheme", "always") != "never")
    if "Fuse" not in names:
        return None
    # Before `Fuse` a decoder sees one token, after it the whole text.
    before, after = parts[: names.index("Fuse")], parts[names.index("Fuse") + 1 :]
    if any(part["type"] not in ("Replace", "ByteFallback") for part in before):
        return None
    byte_fallback = any(part["type"] == "ByteFallback" for part in before)
    match after:
        case []:
            return TableScheme(byte_fallback=byte_fallback)
        case [{"type": "Strip", "content": str(content), "start": int(start), "stop": 0}]:
            return TableScheme(byte_fallback=byte_fallback, strip=content, strip_count=start)
        case _:
            return None


def _flatten(decoder: dict[str, Any]) -> list[dict[str, Any]]:
    if decoder["type"] != "Sequence":
        return [decoder]
    return [part for inner in decoder["decoders"] for part in _flatten(inner)]


def _byte_level_alphabet() -> dict[str, int]:
    """The byte that each character of a byte-level token stands for.

    GPT-2's assignment: printable bytes stand for themselves, the others follow from U+0100.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    alphabet = {chr(byte): byte for byte in printable}
    alphabet.update({chr(256 + i): byte for i, byte in enumerate(others)})
    return alphabet


BYTE_OF_CHARACTER = _byte_level_alphabet()


class TokenTable(dict[int, "str | bytes"]):
    """What each token id adds to a text, filled as ids appear; one per tokenizer.

    A value is a `str` where the token is whole characters, else its `bytes`. Ids that decoding
    skips (unknown ones, and special tokens with `skip_special_tokens`) are "".
    """

    def __init__(self, backend: tokenizers.Tokenizer, scheme: TableScheme, skip_special_tokens: bool) -> None:
        super().__init__()
        self._backend = backend
        self.scheme = scheme
        added = backend.get_added_tokens_decoder()
        self._skipped = {i for i, token in added.items() if token.special} if skip_special_tokens else set()

    def __missing__(self, token_id: int) -> str | bytes:
        piece = self[token_id] = self._piece(token_id)
        return piece

    def first(self, token_id: int) -> str | bytes:
        """What the token adds as the very first of a text."""
        token = self._token(token_id)
        if token is None or not self.scheme.first_differs:
            return self[token_id]
        return str(self._backend.decoder.decode([token]))

    def is_visible(self, token_id: int) -> bool:
        """Whether the decoder gets to see the token at all."""
        return self._token(token_id) is not None

    def _token(self, token_id: int) -> str | None:
        if token_id < 0 or token_id in self._skipped:
            return None
        token: str | None = self._backend.id_to_token(token_id)
        return token

    def _piece(self, token_id: int) -> str | bytes:
        token = self._token(token_id)
        if token is None:
            return ""
        if self.scheme.byte_level:
            try:
                raw = bytes([BYTE_OF_CHARACTER[character] for character in token])
            except KeyError:
                return token  # an added token, spelt out
            return _as_text(raw)
        if self.scheme.byte_fallback and (match := _BYTE_TOKEN.fullmatch(token)):
            return _as_text(bytes([int(match[1], 16)]))
        # Behind another token, because the start of a text is special.
        return str(self._backend.decoder.decode(["a", token])).removeprefix("a")


def _as_text(raw: bytes) -> str | bytes:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return raw
