"""How the tokens of a request are chosen, when it stops and what it returns: `SamplingParams`.

Names, defaults and meanings are vLLM's. Every violation raises `InvalidRequestError`, a `ValueError`
that names the field, the value and what is allowed.
"""

from __future__ import annotations

import copy
import enum
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, NoReturn

from jaxllm.errors import InvalidRequestError
from jaxllm.structured_outputs import GuidedDecodingParams, StructuredOutputsParams
from jaxllm.validation import boolean, integer, number, refuse, strings, token_ids

logger = logging.getLogger(__name__)

GREEDY_TEMPERATURE = 1e-5
"""Temperatures below this are greedy."""

MIN_TEMPERATURE = 1e-2
"""A temperature between greedy and this overflows float32 logits; it is raised to this."""

MAX_SEQUENCES = 16384
"""Largest `n` and `beam_width`."""

MAX_LOGIT_BIAS = 100.0


class SamplingType(enum.IntEnum):
    """How a request draws its tokens."""

    GREEDY = 0
    RANDOM = 1
    RANDOM_SEED = 2


class RequestOutputKind(enum.Enum):
    """What each `RequestOutput` of a request holds."""

    CUMULATIVE = 0
    """Everything generated so far, every time."""
    DELTA = 1
    """What is new since the last one."""
    FINAL_ONLY = 2
    """Everything, once, at the end."""


@dataclass(frozen=True)
class RepetitionDetectionParams:
    """Ends a sequence whose output ends in the same run of tokens again and again.

    Attributes:
        max_pattern_size: longest run looked for, in tokens; 0 turns the check off.
        min_pattern_size: shortest run looked for; 0 means 1.
        min_count: how many times in a row the run must stand; at least 2.
    """

    max_pattern_size: int = 0
    min_pattern_size: int = 0
    min_count: int = 0

    def __post_init__(self) -> None:
        for name in ("max_pattern_size", "min_pattern_size", "min_count"):
            label = f"repetition_detection.{name}"
            value = integer(label, getattr(self, name), low=0)
            object.__setattr__(self, name, value)
        if self.min_pattern_size > self.max_pattern_size:
            refuse(
                "repetition_detection.min_pattern_size",
                self.min_pattern_size,
                f"at most max_pattern_size={self.max_pattern_size}",
            )
        if self.max_pattern_size > 0 and self.min_count < 2:
            refuse(
                "repetition_detection.min_count",
                self.min_count,
                "at least 2 where max_pattern_size is above 0 (set max_pattern_size=0 to turn the check off)",
            )


@dataclass
class SamplingParams:
    """Parameters of one request.

    It may be changed after construction: `verify()`, which every engine calls on its own copy when a
    request is made, checks and normalises it again.

    Attributes:
        n: completions to return, 1 to 16384; more than 1 needs sampling (temperature above 0).
        presence_penalty: subtracted from the logits of tokens that the output already holds, [-2, 2].
        frequency_penalty: subtracted once for each time that the output holds the token, [-2, 2].
        repetition_penalty: divides the positive and multiplies the negative logits of tokens that
            prompt or output hold (CTRL, Keskar et al. 2019, section 4.1); above 0.
        temperature: divides the logits, [0, 2]; below 1e-5 the most probable token is taken.
        top_p: samples from the smallest set of tokens whose probabilities sum to at least this
            (Holtzman et al. 2020), (0, 1].
        top_k: samples from this many most probable tokens; 0 or -1 is all.
        min_p: drops tokens less probable than this fraction of the most probable one, [0, 1].
        seed: makes the samples reproducible, whatever else runs in the batch.
        stop: strings that end the output, which does not hold them.
        stop_token_ids: ids that end the output, which holds them as its last token.
        ignore_eos: go on after the end-of-sequence token.
        max_tokens: output tokens at most; None is whatever the context has room for.
        min_tokens: output tokens before which neither end of sequence nor a stop applies.
        logprobs: log-probabilities of this many most probable tokens at each output position, and of
            the sampled one; -1 is the whole vocabulary.
        prompt_logprobs: the same for the positions of the prompt.
        detokenize: whether to make text of the output tokens.
        skip_special_tokens: leave special tokens out of the text.
        spaces_between_special_tokens: put spaces between special tokens in the text.
        include_stop_str_in_output: let the text end with the stop string that ended it.
        output_kind: what is returned while the request runs.
        skip_clone: `clone()` may share lists with the original, which its owner promises not to change.
        structured_outputs: the form that the output must have, such as a JSON schema.
        logit_bias: added to the logits of these token ids, [-100, 100].
        allowed_token_ids: only these ids are ever sampled.
        bad_words: sequences of tokens that are never completed.
        skip_reading_prefix_cache: compute the whole prompt even where the prefix cache holds it. Requests
            with `prompt_logprobs` always do.
        thinking_token_budget: tokens of reasoning at most; then the mark that ends it is written. Needs
            `LLM(reasoning_parser=...)`; None and -1 are no bound.
        repetition_detection: ends output that goes in circles, with finish reason "repetition".
        guided_decoding: what older releases of vLLM called `structured_outputs`; moved there.
        bad_words_token_ids: `bad_words` as token ids; filled in by the engine.

    Raises:
        InvalidRequestError: a field has the wrong type, is out of range, or is not supported.
    """

    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logprob_token_ids: list[int] | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    skip_clone: bool = False
    structured_outputs: StructuredOutputsParams | None = None
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: list[int] | None = None
    extra_args: dict[str, Any] | None = None
    bad_words: list[str] | None = None
    skip_reading_prefix_cache: bool | None = None
    thinking_token_budget: int | None = None
    repetition_detection: RepetitionDetectionParams | None = None
    # Known to vLLM and refused here unless they are left alone.
    watermarking: bool | None = None
    prompt_logprob_token_ids: Any = None
    prompt_logprob_start: int | None = None
    flat_logprobs: bool = False
    stream_interval: int | None = None
    trace_decode_token_ids: list[int] | None = None
    guided_decoding: GuidedDecodingParams | None = None

    bad_words_token_ids: list[list[int]] | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self.verify()

    @classmethod
    def from_optional(cls, **arguments: Any) -> SamplingParams:
        """Build from what a JSON body holds.

        None means the default, and the keys of `logit_bias` may be strings of digits. `max_tokens=None`
        keeps its meaning: no limit but the context's.
        """
        known = {f.name for f in fields(cls) if f.init}
        for name in arguments:
            if name not in known:
                raise InvalidRequestError(
                    f"SamplingParams has no field {name!r}; it has {', '.join(sorted(known))}.", param=name
                )
        given = {k: v for k, v in arguments.items() if v is not None or k == "max_tokens"}
        bias = given.get("logit_bias")
        if isinstance(bias, Mapping):
            given["logit_bias"] = {_token_id_key(key): value for key, value in bias.items()}
        return cls(**given)

    def verify(self) -> None:
        """Check every field and bring it to its normal form (lists for `stop`, 0 for `top_k=-1`, ...).

        Raises:
            InvalidRequestError: naming the field, its value, and what is allowed.
        """
        self._refuse_unsupported()
        self._verify_sampling()
        self._verify_length_and_stops()
        self._verify_returned()
        self._verify_token_choice()
        self._verify_structured_outputs()
        if self.n > 1 and self.is_greedy:
            refuse(
                "n",
                self.n,
                "1 where temperature is 0: greedy completions are all the same (raise temperature)",
            )

    def _refuse_unsupported(self) -> None:
        if self.logprob_token_ids is not None:
            _unsupported("logprob_token_ids", "ask for logprobs=k, or logprobs=-1 for the whole vocabulary")
        if self.extra_args:
            _unsupported("extra_args", "there is no plugin here that would read it")
        for name in ("watermarking", "flat_logprobs"):
            if getattr(self, name):
                _unsupported(name, "leave it out")
        for name in ("prompt_logprob_token_ids", "prompt_logprob_start"):
            if getattr(self, name) is not None:
                _unsupported(name, "ask for prompt_logprobs=k")
        for name in ("stream_interval", "trace_decode_token_ids"):
            if getattr(self, name) is not None:
                _unsupported(name, "leave it out")

    def _verify_sampling(self) -> None:
        self.n = integer("n", self.n, low=1, high=MAX_SEQUENCES)
        self.presence_penalty = number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        self.frequency_penalty = number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        self.repetition_penalty = number("repetition_penalty", self.repetition_penalty, 0.0, above_low=True)
        self.temperature = number("temperature", self.temperature, 0.0, 2.0)
        if GREEDY_TEMPERATURE <= self.temperature < MIN_TEMPERATURE:
            logger.warning("temperature %s is raised to %s.", self.temperature, MIN_TEMPERATURE)
            self.temperature = MIN_TEMPERATURE
        self.top_p = number("top_p", self.top_p, 0.0, 1.0, above_low=True)
        self.top_k = max(0, integer("top_k", self.top_k, low=-1, off="0 or -1 for all tokens"))
        self.min_p = number("min_p", self.min_p, 0.0, 1.0)
        if self.is_greedy:
            self.top_p, self.top_k, self.min_p = 1.0, 0, 0.0
        if self.seed is not None:
            self.seed = integer("seed", self.seed, low=-(2**63), high=2**64 - 1)
            if self.seed == -1:
                self.seed = None

    def _verify_length_and_stops(self) -> None:
        if self.max_tokens is not None:
            self.max_tokens = integer("max_tokens", self.max_tokens, low=1)
        self.min_tokens = integer("min_tokens", self.min_tokens, low=0)
        if self.thinking_token_budget is not None:
            budget = integer(
                "thinking_token_budget", self.thinking_token_budget, low=-1, off="-1 for no bound"
            )
            self.thinking_token_budget = None if budget == -1 else budget
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            refuse("min_tokens", self.min_tokens, f"at most max_tokens={self.max_tokens}")
        boolean("ignore_eos", self.ignore_eos)
        self.stop = strings("stop", [self.stop] if isinstance(self.stop, str) else self.stop)
        self.stop_token_ids = token_ids("stop_token_ids", self.stop_token_ids)
        if self.stop and self.detokenize is False:
            refuse("stop", self.stop, "empty where detokenize is False (set detokenize=True)")
        detection = self.repetition_detection
        if detection is not None and not isinstance(detection, RepetitionDetectionParams):
            refuse("repetition_detection", detection, "a RepetitionDetectionParams or None")

    def _verify_returned(self) -> None:
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if value is not None:
                value = (
                    1 if value is True else integer(name, value, low=-1, off="-1 for the whole vocabulary")
                )
                setattr(self, name, value)
        for name in (
            "detokenize",
            "skip_special_tokens",
            "spaces_between_special_tokens",
            "include_stop_str_in_output",
            "skip_clone",
        ):
            boolean(name, getattr(self, name))
        if self.skip_reading_prefix_cache is not None:
            boolean("skip_reading_prefix_cache", self.skip_reading_prefix_cache)
        if not isinstance(self.output_kind, RequestOutputKind):
            refuse("output_kind", self.output_kind, "one of " + ", ".join(map(str, RequestOutputKind)))

    def _verify_token_choice(self) -> None:
        if self.logit_bias is not None:
            if not isinstance(self.logit_bias, Mapping):
                refuse("logit_bias", self.logit_bias, "a dict from token id to bias")
            self.logit_bias = {
                integer("logit_bias token id", token_id, low=0, param="logit_bias"): number(
                    f"logit_bias[{token_id}]", bias, -MAX_LOGIT_BIAS, MAX_LOGIT_BIAS, param="logit_bias"
                )
                for token_id, bias in self.logit_bias.items()
            }
        if self.allowed_token_ids is not None:
            self.allowed_token_ids = token_ids("allowed_token_ids", self.allowed_token_ids)
            if not self.allowed_token_ids:
                refuse("allowed_token_ids", [], "at least one token id, or None for all of them")
        self.bad_words = strings("bad_words", self.bad_words)

    def _verify_structured_outputs(self) -> None:
        for name in ("structured_outputs", "guided_decoding"):
            constraint = getattr(self, name)
            if constraint is not None:
                if not isinstance(constraint, StructuredOutputsParams):
                    refuse(name, constraint, "a StructuredOutputsParams or None")
                constraint.verify()
        if self.guided_decoding is not None:
            if self.structured_outputs is not None:
                refuse("guided_decoding", self.guided_decoding, "left out beside structured_outputs")
            self.structured_outputs, self.guided_decoding = self.guided_decoding, None

    def clone(self) -> SamplingParams:
        """A copy that can be changed without changing this one."""
        clone = copy.copy(self)
        if self.skip_clone:
            return clone
        for name in _MUTABLE:
            # Whatever a user has put there: it is checked by `verify`.
            setattr(clone, name, copy.copy(getattr(self, name)))
        return clone

    def update_from_generation_config(
        self, generation_config: Mapping[str, Any], eos_token_id: int | None = None
    ) -> None:
        """Let the further end-of-sequence ids of a `generation_config.json` stop this request.

        Args:
            eos_token_id: the tokenizer's own, which stops without a stop reason and is left out here.
        """
        if self.ignore_eos:
            return
        ids = eos_token_ids_of(generation_config)
        further = [i for i in ids if i != eos_token_id and i not in (self.stop_token_ids or [])]
        self.stop_token_ids = [*(self.stop_token_ids or []), *further]

    @property
    def is_greedy(self) -> bool:
        """Whether the most probable token is taken instead of sampling."""
        return self.temperature < GREEDY_TEMPERATURE

    @property
    def sampling_type(self) -> SamplingType:
        """Greedy, random, or random with a seed of its own."""
        if self.is_greedy:
            return SamplingType.GREEDY
        return SamplingType.RANDOM if self.seed is None else SamplingType.RANDOM_SEED


_MUTABLE = ("stop", "stop_token_ids", "logit_bias", "allowed_token_ids", "bad_words", "bad_words_token_ids")


@dataclass
class BeamSearchParams:
    """Parameters of `LLM.beam_search`.

    Attributes:
        beam_width: sequences kept at each step, and returned.
        max_tokens: output tokens of a sequence at most.
        ignore_eos: do not end sequences at the end-of-sequence token.
        temperature: of the distribution whose log-probabilities are summed where the engine's
            `logprobs_mode` is a processed one, [0, 2]; the default mode sums the model's own.
        length_penalty: exponent of the length by which the summed log-probability is divided, [-16, 16];
            above 1 favours long sequences, below 1 short ones.
        include_stop_str_in_output: keep the text of the end-of-sequence token that ended a sequence.
        structured_outputs: refused: a beam asks for one token at a time, with no memory of a form.
        skip_special_tokens: leave special tokens out of the text.
    """

    beam_width: int
    max_tokens: int
    ignore_eos: bool = False
    temperature: float = 0.0
    length_penalty: float = 1.0
    include_stop_str_in_output: bool = False
    structured_outputs: StructuredOutputsParams | None = None
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        self.verify()

    def verify(self) -> None:
        """Check every field.

        Raises:
            InvalidRequestError: naming the field, its value, and what is allowed.
        """
        self.beam_width = integer("beam_width", self.beam_width, low=1, high=MAX_SEQUENCES)
        self.max_tokens = integer("max_tokens", self.max_tokens, low=1)
        self.temperature = number("temperature", self.temperature, 0.0, 2.0)
        self.length_penalty = number("length_penalty", self.length_penalty, -16.0, 16.0)
        for name in ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens"):
            boolean(name, getattr(self, name))
        if self.structured_outputs is not None:
            _unsupported("structured_outputs", "beam search knows no constraints; use generate")


def eos_token_ids_of(config: Mapping[str, Any]) -> list[int]:
    """The `eos_token_id` of a model's or a generation's config, which may be absent, one id or several."""
    ids = config.get("eos_token_id")
    if ids is None:
        return []
    return [int(i) for i in ids] if isinstance(ids, Iterable) else [int(ids)]


def _unsupported(name: str, advice: str) -> NoReturn:
    raise InvalidRequestError(f"{name} is not supported yet: {advice}.", param=name)


def _token_id_key(key: Any) -> Any:
    if isinstance(key, str):
        try:
            return int(key)
        except ValueError:
            refuse("logit_bias", key, "a dict whose keys are token ids", param="logit_bias")
    return key
