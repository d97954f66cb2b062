"""From token ids to text, a token at a time, at a cost that does not grow with the text.

Two ways. Where a tokenizer's decoder turns every token into the same bytes wherever it stands
(byte-level BPE, sentencepiece), a `TokenTable` holds those bytes and `TableDetokenizer` joins them
and holds back an unfinished UTF-8 character. Everything else
(word pieces, slow tokenizers) goes through `WindowDetokenizer`, which decodes a short window of
recent tokens again at every step and gives out what was added.

The text of a completion is what follows its prompt: the space between the two belongs to it. Bytes
of a character that the prompt left unfinished are given out with the token that completes it.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Any, Protocol

import tokenizers

from jaxllm.text.token_table import TokenTable, table_scheme

REPLACEMENT_CHARACTER = "\N{REPLACEMENT CHARACTER}"

# The longest UTF-8 sequence has 4 bytes, so the last 4 tokens say whether a text ends inside one.
_UTF8_TOKENS = 4
# Prompt tokens decoded before the first output token, so that its leading space comes out right.
_CONTEXT_TOKENS = 6
# Tokens that a window may hold back for a character that does not end; byte tokens need 3.
_MAX_HELD_TOKENS = 16


class Detokenizer(Protocol):
    """The text of one growing sequence of tokens."""

    def step(self, token_id: int) -> str:
        """The text that this token adds; "" while a character is incomplete."""
        ...

    def flush(self) -> str:
        """The text still held back, an incomplete character as U+FFFD; ends the sequence."""
        ...


class DetokenizerFactory:
    """Makes the detokenizers of one tokenizer, and shares between them what can be shared.

    Args:
        tokenizer: of Hugging Face, fast or slow.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._backend = backend_of(tokenizer)
        scheme = None if self._backend is None else table_scheme(self._backend)
        self._tables: dict[bool, TokenTable] | None = None
        if self._backend is not None and scheme is not None:
            self._tables = {skip: TokenTable(self._backend, scheme, skip) for skip in (False, True)}

    def detokenizer(
        self,
        prompt_token_ids: Sequence[int] = (),
        *,
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
    ) -> Detokenizer:
        """A detokenizer for the tokens that follow `prompt_token_ids`."""
        if self._tables is not None:
            return TableDetokenizer(self._tables[skip_special_tokens], prompt_token_ids)
        return WindowDetokenizer(
            self._tokenizer, prompt_token_ids, skip_special_tokens, spaces_between_special_tokens
        )

    def token_texts(self, token_ids: Sequence[int] = ()) -> TokenTexts:
        """Texts of single tokens, for logprobs, where `token_ids` stand before the first of them."""
        if self._tables is not None:
            return _TableTokenTexts(self._tables[False], token_ids)
        return _SlowTokenTexts(self._tokenizer)


def backend_of(tokenizer: Any) -> tokenizers.Tokenizer | None:
    """The `tokenizers.Tokenizer` inside a fast tokenizer, None for a slow one."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return backend if isinstance(backend, tokenizers.Tokenizer) else None


class TableDetokenizer:
    """Joins the pieces of a `TokenTable`; invalid UTF-8 becomes U+FFFD, as `bytes.decode` has it.

    With byte-level BPE the text is exactly the tokenizer's own `decode`. With byte fallback it is so
    for well-formed bytes; in a run of byte tokens that holds an invalid byte, `decode` throws all of
    the run away, also characters that were given out long before, and this keeps them.
    """

    __slots__ = ("_at_start", "_pending", "_strip_left", "_table")

    def __init__(self, table: TokenTable, prompt_token_ids: Sequence[int]) -> None:
        self._table = table
        self._pending = b""
        self._strip_left = table.scheme.strip_count
        self._at_start = (table.scheme.first_differs or self._strip_left > 0) and not any(
            table.is_visible(i) for i in reversed(prompt_token_ids)
        )
        pieces = [table[i] for i in prompt_token_ids[-_UTF8_TOKENS:]]
        tail = b"".join(piece.encode() if isinstance(piece, str) else piece for piece in pieces)
        if tail:
            _, used = codecs.utf_8_decode(tail, "replace", False)
            self._pending = tail[used:]

    def step(self, token_id: int) -> str:
        if self._at_start:
            return self._first_step(token_id)
        piece = self._table[token_id]
        if not self._pending and type(piece) is str:
            return piece
        return self._decode(piece)

    def flush(self) -> str:
        text = self._pending.decode(errors="replace")
        self._pending = b""
        return text

    def _decode(self, piece: str | bytes) -> str:
        raw = piece.encode() if isinstance(piece, str) else piece
        raw = self._pending + raw
        text, used = codecs.utf_8_decode(raw, "replace", False)
        self._pending = raw[used:]
        return text

    def _first_step(self, token_id: int) -> str:
        """A step while the text is still empty, where decoders drop the leading space."""
        if not self._table.is_visible(token_id):
            return ""
        scheme = self._table.scheme
        if scheme.first_differs:
            self._at_start = False
            return self._decode(self._table.first(token_id))
        text = self._decode(self._table[token_id])
        while self._strip_left and text.startswith(scheme.strip):
            text = text.removeprefix(scheme.strip)
            self._strip_left -= 1
        self._at_start = self._strip_left > 0 and not text and not self._pending
        return text


class WindowDetokenizer:
    """Decodes the last few tokens at every step and gives out what the newest one added."""

    __slots__ = ("_added", "_decode", "_held", "_last_was_added", "_skipped", "_window", "_window_text")

    def __init__(
        self,
        tokenizer: Any,
        prompt_token_ids: Sequence[int],
        skip_special_tokens: bool,
        spaces_between_special_tokens: bool,
    ) -> None:
        self._decode = _window_decoder(tokenizer, skip_special_tokens, spaces_between_special_tokens)
        self._skipped = frozenset(tokenizer.all_special_ids) if skip_special_tokens else frozenset()
        # Fast tokenizers put spaces around added tokens whatever one asks; between two of them we do not.
        self._added: dict[int, str] = {}
        backend = backend_of(tokenizer)
        if backend is not None and not skip_special_tokens and not spaces_between_special_tokens:
            self._added = {i: token.content for i, token in backend.get_added_tokens_decoder().items()}
        # The tokens given out last, which give the next ones their context, and those held back.
        self._window: list[int] = []
        for token_id in reversed(prompt_token_ids):
            if token_id not in self._skipped:
                self._window.insert(0, token_id)
                if len(self._window) == _CONTEXT_TOKENS:
                    break
        self._window_text = self._decode(self._window) if self._window else ""
        self._held = 0
        self._last_was_added = False

    def step(self, token_id: int) -> str:
        if token_id in self._skipped:
            return ""
        was_added, self._last_was_added = self._last_was_added, token_id in self._added
        self._window.append(token_id)
        self._held += 1
        text = self._decode(self._window)
        grown = len(text) > len(self._window_text)
        if (not grown or text.endswith(REPLACEMENT_CHARACTER)) and self._held < _MAX_HELD_TOKENS:
            return ""
        new = text[len(self._window_text) :]
        if was_added and self._last_was_added and self._held == 1:
            new = self._added[token_id]
        self._window = self._window[-self._held :]
        self._window_text = self._decode(self._window)
        self._held = 0
        return new

    def flush(self) -> str:
        if not self._held:
            return ""
        new = self._decode(self._window)[len(self._window_text) :]
        self._window, self._window_text, self._held = [], "", 0
        return new


def _window_decoder(tokenizer: Any, skip_special_tokens: bool, spaces_between_special_tokens: bool) -> Any:
    backend = backend_of(tokenizer)
    if backend is not None:

        def decode_fast(token_ids: list[int]) -> str:
            return str(backend.decode(token_ids, skip_special_tokens=skip_special_tokens))

        return decode_fast

    def decode_slow(token_ids: list[int]) -> str:
        return str(
            tokenizer.decode(
                token_ids,
                skip_special_tokens=skip_special_tokens,
                clean_up_tokenization_spaces=False,
                spaces_between_special_tokens=spaces_between_special_tokens,
            )
        )

    return decode_slow


class TokenTexts(Protocol):
    """Texts of candidate tokens at a position that moves on token by token.

    A candidate's text is what it would add to the text so far: "" where it leaves a character
    incomplete, and the whole character where it completes one. So the texts of the tokens that were
    chosen add up to the completion. Special tokens are spelt out.
    """

    def text(self, token_id: int) -> str:
        """The text of a candidate for the current position."""
        ...

    def advance(self, token_id: int) -> None:
        """Puts the token that was chosen at the current position, and moves to the next."""
        ...


class _TableTokenTexts:
    __slots__ = ("_pending", "_table")

    def __init__(self, table: TokenTable, token_ids: Sequence[int]) -> None:
        self._table = table
        self._pending = b""
        for token_id in token_ids[-_UTF8_TOKENS:]:
            self.advance(token_id)

    def text(self, token_id: int) -> str:
        piece = self._table[token_id]
        if not self._pending and type(piece) is str:
            return piece
        return codecs.utf_8_decode(self._bytes(piece), "replace", False)[0]

    def advance(self, token_id: int) -> None:
        raw = self._bytes(self._table[token_id])
        self._pending = raw[codecs.utf_8_decode(raw, "replace", False)[1] :]

    def _bytes(self, piece: str | bytes) -> bytes:
        return self._pending + (piece.encode() if isinstance(piece, str) else piece)


class _SlowTokenTexts:
    """Tokens decoded on their own; one that is part of a character is ""."""

    __slots__ = ("_decode", "_texts")

    def __init__(self, tokenizer: Any) -> None:
        self._decode = _window_decoder(tokenizer, False, True)
        self._texts: dict[int, str] = {}

    def text(self, token_id: int) -> str:
        text = self._texts.get(token_id)
        if text is None:
            text = self._decode([token_id])
            text = self._texts[token_id] = "" if text.endswith(REPLACEMENT_CHARACTER) else text
        return text

    def advance(self, token_id: int) -> None:
        pass
