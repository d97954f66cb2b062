"""Constrained decoding: constraints compiled for a tokenizer, and what they allow next.

llguidance does both: an Earley parser over lexemes found by derivatives of regular expressions, run
along a trie of the vocabulary. Here is what an engine needs around it: compilation on threads of its
own, kept results, bounds on time and memory, and masks for a whole batch at once.
"""

from __future__ import annotations

import asyncio
import functools
import json
import os
import threading
from collections import OrderedDict
from collections.abc import Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import llguidance
import numpy as np

from jaxllm.errors import InvalidRequestError
from jaxllm.structured_outputs import StructuredOutputsConfig, StructuredOutputsParams
from jaxllm.text.constraints import grammar_of, locate
from jaxllm.text.regex_states import State, choice_states, regex_states
from jaxllm.text.thinking import ThinkingBudget

_MAX_THREADS = 32

COMPILE_SECONDS = 20.0
"""How long a request waits for its grammar before it is refused."""

MAX_CACHED = 256
"""Grammars kept, the most recently used ones."""


def _limits(initial_lexer_fuel: int) -> llguidance.LLParserLimits:
    """Seconds of compilation, tens of milliseconds for a mask and 100 MB of automaton states, at worst."""
    return llguidance.LLParserLimits(
        initial_lexer_fuel=initial_lexer_fuel,
        step_lexer_fuel=200_000,
        step_max_items=50_000,
        max_lexer_states=50_000,
        max_grammar_size=50_000,
        verbose_errors=False,
    )


# Grammars may define terminals by one another, and burn fuel ten times as slowly as schemas with it.
_LIMITS = {"grammar": _limits(100_000), "structural_tag": _limits(100_000)}
_LIMITS_ELSE = _limits(1_000_000)


class GrammarMatcher:
    """How far one sequence has come in its grammar. For one thread at a time.

    Args:
        matcher: at the beginning; None where only the reasoning before an answer is bounded.
        tokens: of its tokenizer; None where there is no matcher.
        place: in an expression that is followed, with the masks that others had there; else None.
        starts_after: token ids, such as those that end a model's reasoning: until they have stood in
            the output, in a row, anything may.
        thinking: of the reasoning before that; None is as long as it likes.
    """

    __slots__ = ("_awaited", "_last", "_matcher", "_place", "_recent", "_thinking", "_tokens")

    def __init__(
        self,
        matcher: llguidance.LLMatcher | None,
        tokens: llguidance.LLTokenizer | None,
        place: State | None = None,
        starts_after: Sequence[int] = (),
        thinking: ThinkingBudget | None = None,
    ) -> None:
        self._matcher = matcher
        self._tokens = tokens
        self._place = place
        self._last: int | None = None
        self._thinking = thinking
        self._awaited = list(starts_after)
        self._recent: list[int] = []

    @property
    def num_words(self) -> int:
        """Of a mask over the vocabulary of its tokenizer, 32 tokens each."""
        assert self._tokens is not None
        return -(-self._tokens.vocab_size // 32)

    @property
    def place(self) -> tuple[State, int | None] | None:
        """Two matchers of one grammar at the same place, if they have one, allow the same tokens."""
        place = self._place
        return None if place is None else (place, self._last if place.is_forced else None)

    @property
    def is_active(self) -> bool:
        """Whether the next token is constrained by the grammar."""
        return self._matcher is not None and not self._awaited

    @property
    def compiled(self) -> llguidance.LLMatcher:
        """The matcher of llguidance, which there must be."""
        assert self._matcher is not None
        return self._matcher

    @property
    def forced(self) -> int | None:
        """The one token that may come next, whatever the grammar says; None where it is not so."""
        return None if self._thinking is None else self._thinking.forced

    @property
    def is_complete(self) -> bool:
        """Whether the output matches and nothing but the end of the sequence can follow."""
        return self._matcher is not None and not self._awaited and self._matcher.is_stopped()

    def accept(self, token_id: int) -> str | None:
        """Takes the next token of the output; says what is wrong where it may not follow.

        After an error every further token is one, too.
        """
        if token_id < 0 and (self.is_active or self.forced is not None):
            what = "structured_outputs" if self.forced is None else "thinking_token_budget"
            return (
                f"no token satisfies both {what} and the other parameters of the request "
                "(min_tokens, allowed_token_ids, bad_words, stop_token_ids)."
            )
        if self._thinking is not None:
            self._thinking.accept(token_id)
        if self._awaited:
            self._recent = [*self._recent, token_id][-len(self._awaited) :]
            if self._recent == self._awaited:
                self._awaited = []
            return None
        if self._matcher is None:
            return None
        if self._matcher.consume_token(token_id):
            if self._place is not None:
                self._place, self._last = self._place.after(token_id, self._text_of), token_id
            return None
        self._place = None
        return f"the output cannot go on under structured_outputs: {_clean(self._matcher.get_error())}"

    def fork(
        self, starts_after: Sequence[int] = (), thinking: ThinkingBudget | None = None
    ) -> GrammarMatcher:
        """An independent matcher at the same place in the grammar."""
        matcher = None if self._matcher is None else self._matcher.deep_copy()
        bound = None if thinking is None else thinking.copy()
        return GrammarMatcher(matcher, self._tokens, self._place, starts_after, bound)

    def _text_of(self, token_id: int) -> bytes | None:
        """What a token writes; None for one that writes no text."""
        assert self._tokens is not None
        if self._tokens.is_special_token(token_id):
            return None
        return bytes(self._tokens.decode_bytes([token_id]))


@functools.cache
def _executor() -> llguidance.LLExecutor:
    """The threads that fill masks: on all cores, for whoever wants the masks does nothing else meanwhile.

    Left to itself llguidance takes four cores in five, which of two is one.
    """
    return llguidance.LLExecutor(min(os.cpu_count() or 1, _MAX_THREADS))


def fill_masks(matchers: Sequence[tuple[GrammarMatcher, int]], masks: np.ndarray) -> None:
    """Writes which tokens may come next: bit `v % 32` of word `v // 32` for token v.

    A matcher that met an error allows the end of the sequence alone; `accept` then says so.

    Args:
        matchers: of one tokenizer; each with the row of `masks` that is to hold its tokens.
        masks: int32[rows, words], contiguous, a bit for every token of the model; rows of sequences that
            are not constrained are left alone.
    """
    active = []
    for matcher, row in matchers:
        if (token := matcher.forced) is not None:
            masks[row] = 0
            masks[row : row + 1].view(np.uint32)[0, token // 32] = np.uint32(1 << token % 32)
        elif matcher.is_active:
            active.append((matcher, row))
    if not active:
        return
    num_words = active[0][0].num_words
    if num_words != masks.shape[1]:
        # A tokenizer with more tokens than the model.
        wide = np.empty((masks.shape[0], num_words), np.int32)
        fill_masks(active, wide)
        rows = [row for _, row in active]
        masks[rows] = wide[rows, : masks.shape[1]]
        return
    alone: list[tuple[GrammarMatcher, int]] = []
    first_at: dict[tuple[State, int | None], tuple[GrammarMatcher, int]] = {}
    others: list[tuple[int, int]] = []
    for matcher, row in active:
        place = matcher.place
        if place is None:
            alone.append((matcher, row))
        elif place in first_at:
            others.append((row, first_at[place][1]))
        elif not place[0].recall(place[1], masks[row]):
            first_at[place] = (matcher, row)
    _compute([*alone, *first_at.values()], masks)
    for row, source in others:
        masks[row] = masks[source]
    for (state, last_token), (matcher, row) in first_at.items():
        if not matcher.compiled.is_error():
            state.keep(last_token, masks[row])


def _compute(matchers: Sequence[tuple[GrammarMatcher, int]], masks: np.ndarray) -> None:
    """Has llguidance fill rows of as many words as its vocabulary has."""
    row_bytes = masks.shape[1] * masks.itemsize
    if len(matchers) == 1:
        [(matcher, row)] = matchers
        matcher.compiled.unsafe_compute_mask_ptr(masks[row].ctypes.data, row_bytes)
    elif matchers:
        pairs = [(matcher.compiled, row) for matcher, row in matchers]
        _executor().unsafe_compute_mask_ptr(pairs, masks.ctypes.data, row_bytes, masks.shape[0])


class GrammarCompiler:
    """Compiles constraints for one tokenizer, and keeps what it compiled. For any number of threads.

    Args:
        tokenizer: a fast Hugging Face tokenizer, or None where the engine runs on token ids alone.
        vocab_size: tokens of the model, which may have more than its tokenizer.
        eos_token_ids: ids that end a sequence.
        config: what holds for every constraint.
    """

    def __init__(
        self,
        tokenizer: Any,
        vocab_size: int,
        eos_token_ids: Collection[int],
        config: StructuredOutputsConfig | None = None,
    ) -> None:
        self._config = config or StructuredOutputsConfig()
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_token_ids = sorted(eos_token_ids)
        self._lock = threading.Lock()
        self._compiled: OrderedDict[tuple[object, ...], Future[GrammarMatcher]] = OrderedDict()
        self._threads: ThreadPoolExecutor | None = None

    def submit(self, params: StructuredOutputsParams) -> Future[GrammarMatcher]:
        """Starts to compile, unless that is done or under way.

        Returns:
            A matcher at the beginning of the grammar, to be forked; or `InvalidRequestError`.
        """
        params = self._config.apply(params)
        key = (
            params.kind,
            params.text(),
            params.disable_any_whitespace,
            params.disable_additional_properties,
            params.whitespace_pattern,
        )
        with self._lock:
            future = self._compiled.pop(key, None)
            if future is None:
                if self._threads is None:
                    self._threads = ThreadPoolExecutor(2, thread_name_prefix="jaxllm-grammar")
                future = self._threads.submit(self._compile, params)
            self._compiled[key] = future
            while len(self._compiled) > MAX_CACHED:
                self._compiled.popitem(last=False)
        return future

    def compile(self, params: StructuredOutputsParams) -> GrammarMatcher:
        """A matcher at the beginning of the grammar, to be forked.

        Raises:
            InvalidRequestError: the constraint is wrong, cannot be enforced, or takes too long to compile.
        """
        try:
            return self.submit(params).result(COMPILE_SECONDS)
        except TimeoutError:
            raise took_too_long(params) from None

    def start(
        self, form: StructuredOutputsParams | None, thinking: ThinkingBudget | None
    ) -> GrammarMatcher | None:
        """What constrains an output, to be forked: its form, a bound on its reasoning, or both.

        Raises:
            InvalidRequestError: see `compile`.
        """
        if form is not None:
            return self.compile(form)
        return None if thinking is None else GrammarMatcher(None, None)

    async def wait(self, params: StructuredOutputsParams) -> None:
        """Returns once `compile` has its answer at hand; the event loop goes on meanwhile.

        Raises:
            InvalidRequestError: the constraint takes too long to compile.
        """
        future = asyncio.wrap_future(self.submit(params))
        done, _ = await asyncio.wait([future], timeout=COMPILE_SECONDS)
        if not done:
            raise took_too_long(params)
        future.exception()  # `compile` raises it

    @functools.cached_property
    def _special_tokens(self) -> frozenset[str]:
        """Tokens that text never spells out."""
        added = getattr(self._tokenizer, "added_tokens_decoder", {})
        return frozenset(str(t) for i, t in added.items() if self._tokens.is_special_token(i))

    @functools.cached_property
    def _tokens(self) -> llguidance.LLTokenizer:
        """The vocabulary as a trie; takes a second for a large one."""
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise InvalidRequestError(
                "structured_outputs needs a fast tokenizer (one with a tokenizer.json), and this engine has "
                f"{'none' if self._tokenizer is None else type(self._tokenizer).__name__}.",
                param="structured_outputs",
            )
        from llguidance.hf import from_tokenizer

        size = max(self._vocab_size, len(self._tokenizer))
        try:
            return from_tokenizer(self._tokenizer, n_vocab=size, eos_token=self._eos_token_ids or None)
        except ValueError as error:
            raise InvalidRequestError(
                f"structured_outputs does not work with this model's tokenizer: {error}.",
                param="structured_outputs",
            ) from error

    def _compile(self, params: StructuredOutputsParams) -> GrammarMatcher:
        try:
            grammar = grammar_of(params, self._special_tokens)
        except InvalidRequestError:
            raise
        except Exception as error:  # the converter of GBNF has no exception of its own
            raise _refusal(params, str(error)) from error
        limits = _LIMITS.get(params.kind, _LIMITS_ELSE)
        matcher = llguidance.LLMatcher(self._tokens, grammar, log_level=0, limits=limits)
        if not matcher.is_error():
            # Forks have the first mask of their root, which is most often a large one.
            matcher.compute_bitmask()
        if not matcher.is_error():
            return GrammarMatcher(matcher, self._tokens, _place_of(params))
        message = matcher.get_error()
        if params.kind == "json" and (pointer := locate(json.loads(params.text()), message, limits)):
            message = f"at {pointer}: {message}"
        raise _refusal(params, message)


_WORDS = {
    "json": "The JSON schema",
    "json_object": "The JSON object",
    "regex": "The regex",
    "choice": "The choice",
    "grammar": "The grammar",
    "structural_tag": "The structural tag",
}


def _place_of(params: StructuredOutputsParams) -> State | None:
    """Where the empty text stands, if the constraint is of a kind that can be followed."""
    match params.kind:
        case "regex":
            return regex_states(params.text())
        case "choice":
            return choice_states(json.loads(params.text()))
        case _:
            return None


def took_too_long(params: StructuredOutputsParams) -> InvalidRequestError:
    """What is said to a request whose grammar takes more than `COMPILE_SECONDS`."""
    return _refusal(params, f"it takes more than {COMPILE_SECONDS:.0f} s to compile; make it simpler.")


def _refusal(params: StructuredOutputsParams, message: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"{_WORDS[params.kind]} of structured_outputs cannot be used: {_clean(message)}",
        param="structured_outputs",
    )


def _clean(message: str) -> str:
    """What llguidance says, without its inner state and not too long."""
    message = message.partition("\n<state>")[0].strip()
    return message if len(message) <= 1000 else f"{message[:1000]}..."
