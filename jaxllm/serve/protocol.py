"""The bodies that the server takes, as pydantic models: what is not here is refused by name."""

from __future__ import annotations

import uuid
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from jaxllm.errors import InvalidRequestError, UnsupportedError
from jaxllm.request import SchedulingTerms
from jaxllm.sampling_params import RepetitionDetectionParams, RequestOutputKind, SamplingParams
from jaxllm.serve.body import Body, Refusal, refusal
from jaxllm.serve.structured_outputs import GUIDED, ResponseFormat, constraint_of
from jaxllm.serve.tools import Tool, ToolChoice, check_tools, forced_form
from jaxllm.structured_outputs import StructuredOutputsParams

MAX_STOP_STRINGS = 4

# Fields of OpenAI's and vLLM's APIs that are known and not served. The values listed ask for nothing
# that would not happen anyway, and are taken; any other is refused with these words.
_UNSUPPORTED: dict[str, tuple[tuple[Any, ...], str]] = {
    "guided_decoding_backend": (("auto", "guidance"), "llguidance enforces every form here"),
    "tools": ((), "tools are for chats"),
    "tool_choice": (("none", "auto"), "tools are for chats"),
    "parallel_tool_calls": ((True, False), "tools are for chats"),
    "functions": ((), "it has become 'tools'"),
    "function_call": (("none", "auto"), "it has become 'tool_choice'"),
    "reasoning_effort": ((), "it is for chats"),
    "include_reasoning": ((True,), "it is for chats"),
    "thinking_token_budget": ((-1,), "it is for chats"),
    "suffix": (("",), "no model here fills in the middle of a text"),
    "use_beam_search": ((False,), "beam search is served by LLM.beam_search"),
    "length_penalty": ((1, 1.0), "it belongs to beam search, which is served by LLM.beam_search"),
    "best_of": ((1,), "ask for n completions, and choose by their logprobs"),
    "logprob_token_ids": (([],), "ask for logprobs of the most probable tokens"),
    "prompt_embeds": ((), "send text or token ids"),
    "audio": ((), "only text is served"),
    "modalities": ((["text"],), "only text is served"),
    "mm_processor_kwargs": (({},), "only text is served"),
    "media_io_kwargs": (({},), "only text is served"),
    "prediction": ((), "leave it out; the answer is the same without it"),
    "web_search_options": ((), "no tool runs on this server"),
    "store": ((False,), "nothing is stored"),
    "metadata": (({},), "nothing is stored that it could be attached to"),
    "service_tier": (("auto", "default"), "there is one tier"),
    "verbosity": ((), "say it in the prompt"),
    "watermarking": ((False,), "leave it out"),
    "kv_transfer_params": ((), "disaggregated serving is not here yet"),
    "vllm_xargs": (({},), "no plugin here would read it"),
    "lora_request": ((), "LoRA adapters are not served yet"),
}


class StreamOptions(Body):
    """What a stream carries beside text."""

    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: Literal[False] | None = None


class RepetitionDetection(Body):
    """Bounds of `repetition_detection`."""

    max_pattern_size: int
    min_pattern_size: int = 0
    min_count: int = 2


class GenerationRequest(Body):
    """The fields that completions and chat completions share."""

    # Sent in place of a missing value, where the model's generation_config.json has none either.
    DEFAULTS: ClassVar[dict[str, Any]] = {
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
    }

    # The field that an over-long or empty prompt is blamed on.
    PROMPT_FIELD: ClassVar[str] = "prompt"

    model: str | None = None
    n: int | None = 1
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    min_tokens: int = 0
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    truncate_prompt_tokens: Annotated[int, Field(ge=-1)] | None = None
    truncation_side: Literal["left", "right"] | None = None
    logit_bias: dict[str, float] | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    prompt_logprobs: int | None = None
    repetition_detection: RepetitionDetection | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: dict[str, Any] | None = None
    guided_json: str | dict[str, Any] | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    guided_whitespace_pattern: str | None = None
    skip_reading_prefix_cache: bool | None = None
    priority: Annotated[int, Field(ge=-(2**63), lt=2**63)] = 0
    tenant: Annotated[str, Field(max_length=256)] = ""
    ttft_objective: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    tpot_objective: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    request_id: Annotated[str, Field(min_length=1, max_length=256)] = Field(
        default_factory=lambda: uuid.uuid4().hex
    )
    cache_salt: Annotated[str, Field(min_length=1, max_length=1024)] | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    # For the caller's own bookkeeping; OpenAI's clients send them, and no output depends on them.
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_what_is_not_served(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        kept = dict(data)
        for name in data.keys() & _UNSUPPORTED.keys():
            if name in cls.model_fields:
                continue
            neutral, why = _UNSUPPORTED[name]
            value = kept.pop(name)
            if value is not None and not any(value == v and type(value) is type(v) for v in neutral):
                raise Refusal(UnsupportedError(f"Field '{name}' is not supported: {why}.", param=name))
        return kept

    @model_validator(mode="after")
    def _check_together(self) -> GenerationRequest:
        if self.stream_options is not None and not self.stream:
            raise refusal("Field 'stream_options' is only allowed with 'stream': true.", "stream_options")
        if self.stream and self.prompt_logprobs:
            raise refusal(
                f"Field 'prompt_logprobs' is {self.prompt_logprobs}: a stream carries no prompt logprobs;"
                " leave it out, or set 'stream': false.",
                "prompt_logprobs",
            )
        if isinstance(self.stop, list) and len(self.stop) > MAX_STOP_STRINGS:
            raise refusal(
                f"Field 'stop' has {len(self.stop)} strings: at most {MAX_STOP_STRINGS} are allowed.", "stop"
            )
        if self.truncation_side is not None and self.truncate_prompt_tokens is None:
            raise refusal("Field 'truncation_side' needs 'truncate_prompt_tokens'.", "truncation_side")
        return self

    @property
    def num_completions(self) -> int:
        """`n`, where null means 1."""
        return 1 if self.n is None else self.n

    def scheduling_terms(self) -> SchedulingTerms:
        """How the request wants to be scheduled."""
        return SchedulingTerms(self.priority, self.tenant, self.ttft_objective, self.tpot_objective)

    def constraint(self) -> tuple[str, StructuredOutputsParams] | None:
        """What the form of the output must be, and the field that says so.

        Raises:
            InvalidRequestError: several fields do, or something is wrong with it.
        """
        guided = {name: getattr(self, name) for name in GUIDED}
        return constraint_of(
            self.response_format, self.structured_outputs, guided, self.guided_whitespace_pattern
        )

    def form_field(self) -> str | None:
        """The field that says what the form of the output is."""
        constraint = self.constraint()
        return None if constraint is None else constraint[0]

    def output_limit(self) -> int | None:
        """Output tokens asked for; None is what the context has room for."""
        return self.max_tokens

    def logprobs_wanted(self) -> int | None:
        """Logprobs per output position."""
        raise NotImplementedError

    def to_sampling_params(self, defaults: dict[str, Any]) -> SamplingParams:
        """The parameters of one sequence.

        Args:
            defaults: of the model's `generation_config.json`; what the request says goes before them,
                and OpenAI's own defaults come last.

        Raises:
            InvalidRequestError: naming the field.
        """
        chosen = {}
        for name, fallback in self.DEFAULTS.items():
            value = getattr(self, name)
            chosen[name] = defaults.get(name, fallback) if value is None else value
        stop_token_ids = dict.fromkeys(
            [*(self.stop_token_ids or []), *(defaults.get("stop_token_ids") or [])]
        )
        limit = self.output_limit()
        if limit is None:
            limit = defaults.get("max_tokens")
        detection = self.repetition_detection
        constraint = self.constraint()
        return SamplingParams.from_optional(
            **chosen,
            n=self.num_completions,
            seed=self.seed,
            stop=self.stop,
            stop_token_ids=list(stop_token_ids),
            ignore_eos=self.ignore_eos,
            max_tokens=limit,
            min_tokens=self.min_tokens,
            logprobs=self.logprobs_wanted(),
            prompt_logprobs=self.prompt_logprobs,
            skip_special_tokens=self.skip_special_tokens,
            spaces_between_special_tokens=self.spaces_between_special_tokens,
            include_stop_str_in_output=self.include_stop_str_in_output,
            output_kind=RequestOutputKind.DELTA if self.stream else RequestOutputKind.FINAL_ONLY,
            logit_bias=self.logit_bias,
            allowed_token_ids=self.allowed_token_ids,
            bad_words=self.bad_words,
            structured_outputs=None if constraint is None else constraint[1],
            skip_reading_prefix_cache=self.skip_reading_prefix_cache,
            repetition_detection=None
            if detection is None
            else RepetitionDetectionParams(**detection.model_dump()),
        )


TokenId = Annotated[int, Field(ge=0)]


class CompletionRequest(GenerationRequest):
    """POST /v1/completions."""

    prompt: str | list[TokenId] | list[str] | list[list[TokenId]]
    max_tokens: int | None = 16
    echo: bool | None = False
    logprobs: int | None = None
    add_special_tokens: bool = True

    @model_validator(mode="after")
    def _check_prompt(self) -> CompletionRequest:
        if not self.prompt:
            raise refusal("Field 'prompt' is empty: give text or token ids.", "prompt")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts one by one, each as text or as token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]
        return list(self.prompt)  # type: ignore[arg-type]

    @property
    def echo_only(self) -> bool:
        """Whether only the prompt is wanted back."""
        return bool(self.echo) and self.max_tokens == 0

    def output_limit(self) -> int | None:
        """Output tokens asked for; the engine makes at least one, which an echo then drops."""
        return 1 if self.echo_only else self.max_tokens

    def logprobs_wanted(self) -> int | None:
        """Logprobs per output position."""
        return self.logprobs

    def to_sampling_params(self, defaults: dict[str, Any]) -> SamplingParams:
        """See `GenerationRequest`; an echo with logprobs needs those of the prompt too."""
        params = super().to_sampling_params(defaults)
        if self.echo and self.logprobs is not None:
            wanted = (self.logprobs, self.prompt_logprobs or 0)
            params.prompt_logprobs = -1 if -1 in wanted else max(wanted)
        return params


class ChatCompletionRequest(GenerationRequest):
    """POST /v1/chat/completions."""

    PROMPT_FIELD: ClassVar[str] = "messages"

    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    max_completion_tokens: int | None = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=-1)] | None = None
    echo: bool = False
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool = False
    documents: list[dict[str, Any]] | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[Tool] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    include_reasoning: bool = True
    thinking_token_budget: Annotated[int, Field(ge=-1)] | None = None

    @model_validator(mode="after")
    def _check_chat(self) -> ChatCompletionRequest:
        check_tools(self.tools, self.tool_choice)
        if self.top_logprobs and not self.logprobs:
            raise refusal("Field 'top_logprobs' needs 'logprobs': true.", "top_logprobs")
        if self.continue_final_message:
            if self.add_generation_prompt and "add_generation_prompt" in self.model_fields_set:
                raise refusal(
                    "Fields 'continue_final_message' and 'add_generation_prompt' exclude each other: a new"
                    " message cannot begin while the last one goes on. Set one of them to false.",
                    "add_generation_prompt",
                )
            self.add_generation_prompt = False
        return self

    def output_limit(self) -> int | None:
        """Output tokens asked for, under the field's new or old name."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def logprobs_wanted(self) -> int | None:
        """Logprobs per output position."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def chosen_tool(self) -> ToolChoice:
        """`tool_choice`, or what it means to say nothing."""
        return self.tool_choice or ("auto" if self.tools else "none")

    def to_sampling_params(self, defaults: dict[str, Any]) -> SamplingParams:
        """See `GenerationRequest`; a call that must be made is a form of the output."""
        params = super().to_sampling_params(defaults)
        forced = forced_form(
            self.tools or (), self.chosen_tool, parallel=self.parallel_tool_calls is not False
        )
        if forced is not None:
            if params.structured_outputs is not None:
                raise InvalidRequestError(
                    f"Field '{self.form_field()}' asks for a form, and 'tool_choice' for calls, which have"
                    " one of their own; give one of them.",
                    param="tool_choice",
                )
            params.structured_outputs = forced
        return params

    def form_field(self) -> str | None:
        """The field that says what the form of the output is."""
        return super().form_field() or ("tools" if self.tools else None)


class TokenizeRequest(Body):
    """POST /tokenize: the token ids of a text or of a conversation."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[dict[str, Any]], Field(min_length=1)] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = False
    tools: list[Tool] | None = None

    @model_validator(mode="after")
    def _check_one(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise refusal("Give exactly one of 'prompt' and 'messages'.", "prompt")
        if self.continue_final_message and "add_generation_prompt" not in self.model_fields_set:
            self.add_generation_prompt = False
        return self


class DetokenizeRequest(Body):
    """POST /detokenize: the text of token ids."""

    model: str | None = None
    tokens: list[TokenId]
