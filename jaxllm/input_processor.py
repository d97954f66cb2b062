"""From what a user gives to what the engine takes: prompts and parameters in, `Request`s out."""

from __future__ import annotations

import json
import logging
import operator
import random
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxllm.config import EngineConfig
from jaxllm.errors import ConfigError, InvalidRequestError
from jaxllm.inputs import PromptType, split_prompt
from jaxllm.models.config import ModelConfig
from jaxllm.request import NO_TERMS, Request, SchedulingTerms
from jaxllm.sampling_params import RequestOutputKind, SamplingParams, eos_token_ids_of
from jaxllm.scheduling.policies import terms_of
from jaxllm.structured_outputs import StructuredOutputsConfig
from jaxllm.text.grammar import GrammarCompiler
from jaxllm.text.thinking import ThinkingBudget, refuse_unbounded

logger = logging.getLogger(__name__)

# Keys of generation_config.json that are defaults of SamplingParams, and what they are called there.
_SAMPLING_DEFAULTS = {
    "repetition_penalty": "repetition_penalty",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "max_new_tokens": "max_tokens",
}
_NO_DEFAULTS = ("vllm", "none")
MAX_BAD_WORDS = 128
"""Most token sequences that the `bad_words` of a request may come to."""


@dataclass(frozen=True, slots=True)
class ProcessedInput:
    """A user's request, ready for the engine.

    Attributes:
        requests: one for each of the n completions, in order.
        prompt: the prompt's text, or None where it came as token ids alone.
    """

    requests: list[Request]
    prompt: str | None


class InputProcessor:
    """Tokenizes and checks user requests for one model. May be used from several threads at once.

    Attributes:
        tokenizer: a Hugging Face tokenizer, or None where the engine runs on token ids alone.
        default_sampling_params: fields that differ from `SamplingParams()` for this model, as
            its `generation_config.json` and `override_generation_config` say.
        max_model_len: tokens of a prompt and its output together.
        all_eos_token_ids: every id that ends a sequence of this model.
        grammars: compiles the constraints of `structured_outputs`.
    """

    def __init__(
        self,
        tokenizer: Any,
        model_config: ModelConfig,
        engine_config: EngineConfig,
        generation_config: Mapping[str, Any] | None = None,
    ) -> None:
        """Prepare for a model.

        Args:
            engine_config: resolved, that is with `max_model_len` set.
            generation_config: what the model's own `generation_config.json` holds, if it has one.

        Raises:
            ConfigError: a generation config cannot be read, or holds values out of range.
        """
        if engine_config.max_model_len is None:
            raise ConfigError(
                "max_model_len must be set before requests are processed.", param="max_model_len"
            )
        self.tokenizer = tokenizer
        self.max_model_len = engine_config.max_model_len
        self._vocab_size = model_config.vocab_size
        self._max_logprobs = engine_config.max_logprobs
        self._policy = engine_config.scheduling_policy
        self._policy_terms = terms_of(self._policy)
        self._generation_config = _load_generation_config(engine_config, generation_config)
        self.default_sampling_params = _sampling_defaults(engine_config, self._generation_config)
        self._check_sampling_defaults()

        tokenizer_eos = getattr(tokenizer, "eos_token_id", None)
        further = eos_token_ids_of(self._generation_config) or list(model_config.eos_token_ids)
        # The tokenizer's own id ends a sequence without a stop reason; others that the generation
        # config names act as stop token ids, whose id is the reason.
        self._eos_token_id: int | None = tokenizer_eos
        self._eos_token_ids = frozenset(further if tokenizer_eos is None else [tokenizer_eos])
        self._further_eos: Mapping[str, Any] = {} if tokenizer_eos is None else {"eos_token_id": further}

        self.all_eos_token_ids = self._eos_token_ids | frozenset(further)
        self.grammars = GrammarCompiler(
            tokenizer,
            model_config.vocab_size,
            self.all_eos_token_ids,
            StructuredOutputsConfig.from_mapping(engine_config.structured_outputs_config),
        )

        self._seeds = random.Random(engine_config.seed)
        self._seeds_lock = threading.Lock()

    def default_params(self) -> SamplingParams:
        """The parameters of a request that gives none."""
        return SamplingParams.from_optional(**self.default_sampling_params)

    def process(
        self,
        request_id: str,
        prompt: PromptType,
        params: SamplingParams,
        *,
        terms: SchedulingTerms = NO_TERMS,
        arrival_time: float | None = None,
        cache_salt: str | None = None,
        final_only: bool = False,
        grammar_after: Sequence[int] = (),
        thinking: ThinkingBudget | None = None,
    ) -> ProcessedInput:
        """Tokenize and check one user request; `params` is copied, never changed.

        Args:
            request_id: with n > 1, the requests are called `0_<request_id>`, `1_<request_id>`, ...
            terms: how the request wants to be scheduled.
            arrival_time: in seconds of `time.monotonic()`; None is now.
            cache_salt: as in the prompt's own `cache_salt`, which goes before this.
            final_only: one output at the end, whatever `params.output_kind` says.
            grammar_after: token ids, such as those that end a model's reasoning, which must have stood in
                the output before `structured_outputs` constrains it.
            thinking: of each of the n outputs.

        Raises:
            InvalidRequestError: naming what is wrong with the prompt or a parameter.
        """
        if not isinstance(params, SamplingParams):
            raise InvalidRequestError(
                f"sampling_params must be a SamplingParams; got {type(params).__name__}.",
                param="sampling_params",
            )
        self.check_terms(terms)
        text, given_ids, own_salt = split_prompt(prompt)
        params = self._prepare_params(params)
        refuse_unbounded(params, thinking)
        if final_only:
            params.output_kind = RequestOutputKind.FINAL_ONLY
        token_ids = self.tokenize(text or "") if given_ids is None else as_token_ids(given_ids)
        self.check_prompt(token_ids, given=given_ids is not None)

        room = self.max_model_len - len(token_ids)
        max_tokens = room if params.max_tokens is None else min(params.max_tokens, room)
        arrival = time.monotonic() if arrival_time is None else arrival_time
        grammar = self.grammars.start(params.structured_outputs, thinking)
        requests = [
            Request(
                request_id=request_id if params.n == 1 else f"{i}_{request_id}",
                prompt_token_ids=token_ids,
                sampling_params=params,
                arrival_time=arrival,
                eos_token_ids=self._eos_token_ids,
                max_tokens=max_tokens,
                seed=seed,
                terms=terms,
                cache_salt=own_salt if own_salt is not None else cache_salt,
                group_id=None if params.n == 1 else request_id,
                needs_host_tokens=params.bad_words_token_ids is not None or grammar is not None,
                grammar=None if grammar is None else grammar.fork(grammar_after, thinking),
            )
            for i, seed in enumerate(self._draw_seeds(params))
        ]
        return ProcessedInput(requests, text)

    def check_terms(self, terms: SchedulingTerms) -> None:
        """Refuse what the policy would not look at."""
        if self._policy_terms is None:
            return
        for name, value in terms.given().items():
            if name not in self._policy_terms:
                raise InvalidRequestError(
                    f"{name}={value!r} has no effect under the scheduling policy {self._policy!r}; leave it "
                    "out, or start the engine with a scheduling_policy that goes by it.",
                    param=name,
                )

    def tokenize(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The token ids of a text.

        Args:
            add_special_tokens: as the tokenizer does for a prompt (a beginning-of-sequence token, say);
                False for the output of a chat template, which holds them already.

        Raises:
            InvalidRequestError: there is no tokenizer.
        """
        if self.tokenizer is None:
            raise InvalidRequestError(
                "a text prompt needs a tokenizer, and this engine runs without one (skip_tokenizer_init). "
                "Give prompt_token_ids.",
                param="prompt",
            )
        return list(self.tokenizer.encode(text, add_special_tokens=add_special_tokens, verbose=False))

    def _prepare_params(self, params: SamplingParams) -> SamplingParams:
        """A checked copy, with what depends on the model filled in."""
        params = params.clone()
        params.verify()
        params.logprobs = self._count_logprobs("logprobs", params.logprobs)
        params.prompt_logprobs = self._count_logprobs("prompt_logprobs", params.prompt_logprobs)
        self._check_ids("stop_token_ids", params.stop_token_ids)
        self._check_ids("allowed_token_ids", params.allowed_token_ids)
        self._check_ids("logit_bias", params.logit_bias)
        if params.top_k >= self._vocab_size:
            params.top_k = 0
        if self.tokenizer is None and params.detokenize:
            if params.stop:
                raise InvalidRequestError(
                    "stop needs a tokenizer, and this engine runs without one (skip_tokenizer_init). Use "
                    "stop_token_ids.",
                    param="stop",
                )
            params.detokenize = False
        params.update_from_generation_config(self._further_eos, self._eos_token_id)
        params.bad_words_token_ids = self._tokenize_bad_words(params.bad_words) if params.bad_words else None
        return params

    def check_prompt(self, token_ids: list[int], *, given: bool, room: int = 1) -> None:
        """Refuse a prompt that is empty, too long, or has ids that the model has not.

        Args:
            given: whether the user gave token ids.
            room: output tokens that must fit behind it.
        """
        param = "prompt_token_ids" if given else "prompt"
        if not token_ids:
            raise InvalidRequestError("the prompt is empty: give at least one token.", param=param)
        if min(token_ids) < 0 or max(token_ids) >= self._vocab_size:
            wrong = next(i for i in token_ids if not 0 <= i < self._vocab_size)
            advice = "" if given else " The tokenizer is not the one that this model was made with."
            raise InvalidRequestError(
                f"token id {wrong} of the prompt is outside the model's vocabulary; ids are in "
                f"[0, {self._vocab_size - 1}].{advice}",
                param=param,
            )
        if len(token_ids) > self.max_model_len - room:
            beside = "beside one output token " if room else ""
            raise InvalidRequestError(
                f"the prompt has {len(token_ids)} tokens; at most {self.max_model_len - room} fit {beside}"
                f"into max_model_len={self.max_model_len}. Shorten it, or raise max_model_len "
                "as far as the model goes.",
                param=param,
            )

    def _count_logprobs(self, name: str, value: int | None) -> int | None:
        """How many log-probabilities are meant: -1 is the whole vocabulary, which is also the most."""
        if value is None:
            return None
        wanted = self._vocab_size if value == -1 else value
        allowed = self._vocab_size if self._max_logprobs == -1 else self._max_logprobs
        if wanted > allowed:
            shown = f"{value} (all {wanted} of the vocabulary)" if value == -1 else str(value)
            raise InvalidRequestError(
                f"{name}={shown} is more than the {allowed} that this engine returns; ask for less, or start "
                f"it with max_logprobs={-1 if value == -1 else value}.",
                param=name,
            )
        return min(wanted, self._vocab_size)

    def _check_ids(self, name: str, ids: Iterable[int] | None) -> None:
        wrong = [i for i in ids or () if not 0 <= i < self._vocab_size]
        if wrong:
            raise InvalidRequestError(
                f"{name} holds {_shorten(wrong)}, outside the model's vocabulary; ids are in "
                f"[0, {self._vocab_size - 1}].",
                param=name,
            )

    def _tokenize_bad_words(self, bad_words: Sequence[str]) -> list[list[int]]:
        """Each word as tokenized at the start of a text and, where that differs, after a space."""
        if self.tokenizer is None:
            raise InvalidRequestError(
                "bad_words needs a tokenizer, and this engine runs without one (skip_tokenizer_init). Use "
                "logit_bias to keep single tokens out.",
                param="bad_words",
            )
        sequences: list[list[int]] = []
        for word in bad_words:
            bare = self.tokenize(word.lstrip(), add_special_tokens=False)
            if not bare:
                raise InvalidRequestError(
                    f"bad_words holds {word!r}, which comes to no token; give words that do.",
                    param="bad_words",
                )
            sequences.append(bare)
            spaced = self.tokenize(" " + word.lstrip(), add_special_tokens=False)
            # A longer form starts with a bare space token: banning its last token would hit other words.
            if spaced and spaced[0] != bare[0] and len(spaced) == len(bare):
                sequences.append(spaced)
        if len(sequences) > MAX_BAD_WORDS:
            raise InvalidRequestError(
                f"bad_words comes to {len(sequences)} token sequences; at most {MAX_BAD_WORDS} are allowed.",
                param="bad_words",
            )
        self._check_ids("bad_words", [i for ids in sequences for i in ids])
        return sequences

    def _draw_seeds(self, params: SamplingParams) -> list[int]:
        """A uint32 for each of the n sequences."""
        if params.seed is None:
            with self._seeds_lock:
                return [self._seeds.getrandbits(32) for _ in range(params.n)]
        # Folded to 32 bits before counting, so that no two of the n are the same.
        first = params.seed % 2**64
        return [((first ^ first >> 32) + i) % 2**32 for i in range(params.n)]

    def _check_sampling_defaults(self) -> None:
        try:
            self.default_params()
        except InvalidRequestError as error:
            raise ConfigError(
                f"the model's generation config is no good as a default: {error} Pass "
                'generation_config="none", or mend it with override_generation_config.',
                param="generation_config",
            ) from error


def as_token_ids(token_ids: Any) -> list[int]:
    """A list of ints of any sequence of integers."""
    ids = token_ids.tolist() if hasattr(token_ids, "tolist") else token_ids
    if isinstance(ids, list | tuple):
        if set(map(type, ids)) <= {int}:
            return list(ids)
        try:
            if not any(isinstance(i, bool) for i in ids):
                return [operator.index(i) for i in ids]
        except TypeError:
            pass
        wrong = next(i for i in ids if isinstance(i, bool) or not hasattr(i, "__index__"))
        raise InvalidRequestError(
            f"prompt_token_ids must be integers; got {wrong!r} ({type(wrong).__name__}) among them.",
            param="prompt_token_ids",
        )
    raise InvalidRequestError(
        f"prompt_token_ids must be a list of integers; got {type(token_ids).__name__}.",
        param="prompt_token_ids",
    )


def _load_generation_config(
    engine_config: EngineConfig, of_model: Mapping[str, Any] | None
) -> Mapping[str, Any]:
    """The generation config to go by: the model's own, or that of the directory that was named instead."""
    source = engine_config.generation_config
    if source == "auto" or source in _NO_DEFAULTS:
        # Even without its sampling defaults, the end-of-sequence ids of the model's file count.
        return of_model or {}
    path = Path(source)
    path = path / "generation_config.json" if path.is_dir() else path
    try:
        loaded = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"generation_config={source!r} cannot be read ({error}); give a directory that holds a "
            'generation_config.json, "auto" for the model\'s own, or "none".',
            param="generation_config",
        ) from error
    if not isinstance(loaded, dict):
        raise ConfigError(f"{path} must hold a JSON object.", param="generation_config")
    return loaded


def _sampling_defaults(engine_config: EngineConfig, generation_config: Mapping[str, Any]) -> dict[str, Any]:
    plain = engine_config.generation_config in _NO_DEFAULTS
    merged = {**({} if plain else generation_config), **engine_config.override_generation_config}
    defaults = {
        field: merged[key] for key, field in _SAMPLING_DEFAULTS.items() if merged.get(key) is not None
    }
    if defaults and not plain:
        logger.info(
            'Sampling defaults of this model: %s. Pass generation_config="none" to go without.', defaults
        )
    return defaults


def _shorten(values: list[int]) -> str:
    return str(values) if len(values) <= 8 else f"{str(values[:8])[:-1]}, ... ({len(values)} in all)]"
