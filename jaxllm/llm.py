"""`LLM`: a model for offline use, with vLLM's methods."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar, cast

from jaxllm import beam_search as beams
from jaxllm.beam_search import BeamSearchOutput, Candidates
from jaxllm.config import DEMO_MODEL, engine_config_from
from jaxllm.errors import ConfigError, EngineDeadError, InvalidRequestError, UnsupportedError
from jaxllm.input_processor import ProcessedInput
from jaxllm.inputs import PromptType, TokensPrompt, as_prompt_list
from jaxllm.models.config import ModelConfig
from jaxllm.outputs import RequestOutput
from jaxllm.pooling_methods import PoolingMethods
from jaxllm.progress import SpeedDisplay, interrupt_between_steps, progress_bar
from jaxllm.request import NO_TERMS, Request, SchedulingTerms
from jaxllm.sampling_params import BeamSearchParams, SamplingParams
from jaxllm.stats import Metric, snapshot_metrics
from jaxllm.text.chat_template import ContentFormat, render_chat
from jaxllm.text.reasoner import Reasoner

if TYPE_CHECKING:
    from jaxllm.engine import Engine

logger = logging.getLogger(__name__)

Message = Mapping[str, Any]
UseTqdm = bool | Callable[..., Any]
_T = TypeVar("_T")


class LLM(PoolingMethods):
    """A language model with its tokenizer and KV cache, for offline use.

        llm = LLM("path/or/hub-name", dtype="bfloat16", max_model_len=4096)
        outputs = llm.generate(["The capital of France is"], SamplingParams(temperature=0.8))

    Calls from several threads take turns. `shutdown()`, or the end of a `with` block, lets go of the
    device memory.
    """

    def __init__(
        self,
        model: str | Path = DEMO_MODEL,
        *,
        chat_template: str | Path | None = None,
        reasoning_parser: str | None = None,
        **arguments: Any,
    ) -> None:
        """Load a model and prepare to run it.

        Args:
            model: a directory, a hub name, or "demo" for the bundled demonstration model.
            chat_template: Jinja source, or a file that holds it, instead of the tokenizer's own.
            reasoning_parser: how the model marks its reasoning ("qwen3", "deepseek_r1", ...): for
                `thinking_token_budget`, and for `structured_outputs` to hold for the answer alone.
            **arguments: fields of `jaxllm.config.EngineConfig`, which are vLLM's.

        Raises:
            ConfigError: an argument is unknown or out of range.
            UnsupportedError: an argument of vLLM asks for what is not served yet.
            ModelNotFoundError, UnsupportedModelError, CheckpointError, InsufficientMemoryError: the
                model cannot be loaded.
        """
        config = engine_config_from(model, arguments)
        template = _read_chat_template(chat_template)
        reasoner = Reasoner(reasoning_parser)
        # Here, so that a bad argument is refused before JAX is imported.
        from jaxllm.engine import Engine

        self._start(Engine.from_config(config), template, reasoner)

    @classmethod
    def from_engine(
        cls, engine: Engine, *, chat_template: str | Path | None = None, reasoning_parser: str | None = None
    ) -> LLM:
        """An `LLM` over an engine that exists already."""
        llm = cls.__new__(cls)
        llm._start(engine, _read_chat_template(chat_template), Reasoner(reasoning_parser))
        return llm

    def _start(self, engine: Engine, chat_template: str | None, reasoner: Reasoner) -> None:
        self._engine: Engine | None = engine
        self._chat_template = chat_template
        self._reasoner = reasoner
        self._lock = threading.RLock()
        self._next_id = 0
        self._enqueued: list[str] = []
        self._finished: dict[str, RequestOutput] = {}

    @property
    def llm_engine(self) -> Engine:
        """The engine underneath."""
        if self._engine is None:
            raise EngineDeadError("This LLM was shut down; make a new one.")
        return self._engine

    @property
    def model_config(self) -> ModelConfig:
        """The model's architecture."""
        return self.llm_engine.model_config

    def generate(
        self,
        prompts: PromptType | Sequence[PromptType],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: UseTqdm = True,
        lora_request: None = None,
        priority: int | Sequence[int] | None = None,
        scheduling_terms: SchedulingTerms | Sequence[SchedulingTerms] | None = None,
        tokenization_kwargs: None = None,
        mm_processor_kwargs: None = None,
    ) -> list[RequestOutput]:
        """Complete prompts; all of them run together, in as large batches as memory allows.

        Args:
            prompts: one prompt or a list of them: text, token ids, `TextPrompt` or `TokensPrompt`.
            sampling_params: one for all, or one for each prompt; None is the model's default.
            use_tqdm: show progress; a callable makes the bar in place of `tqdm`.
            priority: one for all, or one for each prompt; lower is served first under
                `scheduling_policy="priority"`.
            scheduling_terms: one for all, or one for each prompt: tenant and objectives, for the policies
                that go by them; holds the priority, too.
            lora_request, tokenization_kwargs, mm_processor_kwargs: not served yet.

        Returns:
            One output for each prompt, in order. A request that failed on its own has `error` set.

        Raises:
            InvalidRequestError: a prompt or its parameters cannot be served; then none has been started.
        """
        _refuse_options(lora_request, tokenization_kwargs, mm_processor_kwargs)
        with self._lock:
            each = as_prompt_list(prompts)
            terms = _terms_of_each(priority, scheduling_terms, len(each))
            return self._run(self._submit(each, sampling_params, terms), use_tqdm)

    def enqueue(
        self,
        prompts: PromptType | Sequence[PromptType],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        lora_request: None = None,
        priority: int | Sequence[int] | None = None,
        use_tqdm: UseTqdm = True,
        tokenization_kwargs: None = None,
        mm_processor_kwargs: None = None,
        scheduling_terms: SchedulingTerms | Sequence[SchedulingTerms] | None = None,
    ) -> list[str]:
        """Hand prompts to the engine without waiting; `wait_for_completion` runs them.

        Arguments are those of `generate`. Returns the ids of the requests, in order.
        """
        _refuse_options(lora_request, tokenization_kwargs, mm_processor_kwargs)
        with self._lock:
            each = as_prompt_list(prompts)
            terms = _terms_of_each(priority, scheduling_terms, len(each))
            request_ids = self._submit(each, sampling_params, terms)
            self._enqueued += request_ids
            return request_ids

    def wait_for_completion(
        self, output_type: type[RequestOutput] = RequestOutput, *, use_tqdm: UseTqdm = True
    ) -> list[RequestOutput]:
        """Run everything that was enqueued, and return its outputs in the order of enqueueing."""
        if output_type is not RequestOutput:
            raise UnsupportedError(f"output_type={output_type!r} is not served; RequestOutput is.")
        with self._lock:
            request_ids, self._enqueued = self._enqueued, []
            return self._run(request_ids, use_tqdm)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: UseTqdm = True,
        lora_request: None = None,
        priority: int | Sequence[int] | None = None,
        chat_template: str | None = None,
        chat_template_content_format: ContentFormat = "auto",
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: list[dict[str, Any]] | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        tokenization_kwargs: None = None,
        mm_processor_kwargs: None = None,
        scheduling_terms: SchedulingTerms | Sequence[SchedulingTerms] | None = None,
    ) -> list[RequestOutput]:
        """Answer a conversation, or each of several.

        Args:
            messages: one conversation, a list of messages with `role` and `content`; or a list of those.
            chat_template: Jinja source instead of the model's own.
            chat_template_content_format: whether the template wants contents as a "string" or as a list
                of parts ("openai"); "auto" reads it off the template.
            add_generation_prompt: end the prompt with what begins an answer.
            continue_final_message: have the last message continued instead.
            tools: offered to the model, where its template knows tools.
            chat_template_kwargs: further variables of the template.

        Other arguments, and what is returned and raised, are as in `generate`.
        """
        _refuse_options(lora_request, tokenization_kwargs, mm_processor_kwargs)
        processor = self.llm_engine.input_processor
        if processor.tokenizer is None:
            raise InvalidRequestError(
                "chat needs a tokenizer, and this engine runs without one (skip_tokenizer_init). Use "
                "generate with prompt_token_ids.",
                param="messages",
            )
        prompts: list[TokensPrompt] = []
        for conversation in _as_conversations(messages):
            text = render_chat(
                processor.tokenizer,
                conversation,
                chat_template=chat_template or self._chat_template,
                content_format=chat_template_content_format,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                tools=tools,
                chat_template_kwargs=chat_template_kwargs,
            )
            # The template writes the special tokens, so the tokenizer must not add them again.
            token_ids = processor.tokenize(text, add_special_tokens=False)
            prompts.append({"prompt": text, "prompt_token_ids": token_ids})
        with self._lock:
            terms = _terms_of_each(priority, scheduling_terms, len(prompts))
            return self._run(self._submit(prompts, sampling_params, terms), use_tqdm)

    def beam_search(
        self,
        prompts: PromptType | Sequence[PromptType],
        params: BeamSearchParams,
        lora_request: None = None,
        use_tqdm: UseTqdm = False,
        concurrency_limit: int | None = None,
    ) -> list[BeamSearchOutput]:
        """Find the most probable continuations of each prompt (see `jaxllm.beam_search`).

        Args:
            prompts: as in `generate`.
            use_tqdm: show progress in tokens, of `params.max_tokens`.
            concurrency_limit: prompts searched at the same time; None is all of them.

        Returns:
            One output for each prompt, in order.
        """
        _refuse_options(lora_request)
        if concurrency_limit is not None and (type(concurrency_limit) is not int or concurrency_limit < 1):
            raise InvalidRequestError(
                f"concurrency_limit must be at least 1, or None for no limit; got {concurrency_limit!r}.",
                param="concurrency_limit",
            )
        engine = self.llm_engine
        processor = engine.input_processor
        one_token = beams.one_token_params(params, engine.config, self.model_config.vocab_size)
        sources = [
            processor.process("beam search", prompt, one_token).requests[0]
            for prompt in as_prompt_list(prompts)
        ]
        at_once = concurrency_limit or max(1, len(sources))
        batches = [sources[i : i + at_once] for i in range(0, len(sources), at_once)]
        total = len(batches) * params.max_tokens
        outputs: list[BeamSearchOutput] = []
        with self._lock, progress_bar(use_tqdm, "Beam search", total, "token") as bar:
            for batch in batches:

                def next_tokens(
                    continued: list[tuple[int, list[int]]], batch: list[Request] = batch
                ) -> list[Candidates]:
                    prompts: list[PromptType] = [
                        {"prompt_token_ids": tokens, "cache_salt": batch[i].cache_salt}
                        for i, tokens in continued
                    ]
                    results = self._run(
                        self._submit(prompts, one_token, [NO_TERMS] * len(prompts)), use_tqdm=False
                    )
                    return [beams.candidates_of(result, one_token) for result in results]

                outputs += beams.beam_search(
                    [request.prompt_token_ids for request in batch],
                    params,
                    eos_token_ids=processor.all_eos_token_ids,
                    max_model_len=processor.max_model_len,
                    next_tokens=next_tokens,
                    on_step=bar.update,
                )
        beams.fill_in_text(outputs, params, processor.tokenizer)
        return outputs

    def get_tokenizer(self) -> Any:
        """The model's Hugging Face tokenizer; None where the engine runs without one."""
        return self.llm_engine.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """What a request without parameters runs with, from the model's `generation_config.json`."""
        return self.llm_engine.input_processor.default_params()

    def get_metrics(self) -> list[Metric]:
        """What the engine has counted since it started: counters, gauges and histograms."""
        return snapshot_metrics(self.llm_engine.stats())

    def reset_prefix_cache(self) -> bool:
        """Forget all cached prefixes. False where running requests still use some, and nothing was done."""
        with self._lock:
            return self.llm_engine.reset_prefix_cache()

    def sleep(self, level: int = 1) -> None:
        """Let go of device memory until `wake_up`: of the KV cache, and of the weights.

        Args:
            level: 1 keeps the weights in the host's memory; 2 does not, and they are loaded anew.
        """
        with self._lock:
            self.llm_engine.sleep(level)

    def wake_up(self, tags: list[str] | None = None) -> bool:
        """Take the device memory again: "weights", "kv_cache", or both where `tags` is None.

        Returns whether the engine is awake, which takes both.
        """
        with self._lock:
            return self.llm_engine.wake_up(tags)

    def start_profile(self, directory: str | os.PathLike[str] = "jaxllm-profile") -> None:
        """Record a trace of what follows with the JAX profiler, until `stop_profile`."""
        with self._lock:
            self.llm_engine.start_profile(os.fspath(directory))

    def stop_profile(self) -> None:
        """Write the trace to the directory that `start_profile` named."""
        with self._lock:
            self.llm_engine.stop_profile()

    def shutdown(self) -> None:
        """Abort what is enqueued, and let go of the engine and its device memory."""
        with self._lock:
            if self._engine is not None:
                self._abort(self._enqueued)
                self._engine.shutdown()
            self._engine = None
            self._enqueued, self._finished = [], {}

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()

    def _submit(
        self,
        prompts: Sequence[PromptType],
        params: SamplingParams | Sequence[SamplingParams] | None,
        each_terms: Sequence[SchedulingTerms],
    ) -> list[str]:
        """Give all prompts to the engine, or none of them where one cannot be served."""
        if params is None:
            params = self.get_default_sampling_params()
        each_params = _one_for_each("sampling_params", params, len(prompts))
        request_ids = self._new_ids(len(prompts))
        each = zip(request_ids, prompts, each_params, each_terms, strict=True)
        self._submit_processed([self._process(*one) for one in each])
        return request_ids

    def _process(
        self, request_id: str, prompt: PromptType, params: SamplingParams, terms: SchedulingTerms
    ) -> ProcessedInput:
        processor = self.llm_engine.input_processor
        after: tuple[int, ...] = ()
        thinking = None
        if isinstance(params, SamplingParams):  # Anything else is refused below.
            after, thinking = self._reasoner.of(prompt, params, processor.tokenizer)
        return processor.process(
            request_id,
            prompt,
            params,
            terms=terms,
            final_only=True,
            grammar_after=after,
            thinking=thinking,
        )

    def _new_ids(self, count: int) -> list[str]:
        ids = [str(self._next_id + i) for i in range(count)]
        self._next_id += count
        return ids

    def _submit_processed(self, processed: Sequence[ProcessedInput]) -> None:
        """Give the engine all of these, or none where it refuses one."""
        submitted: list[str] = []
        try:
            for item in processed:
                self.llm_engine.submit(item.requests, item.prompt)
                submitted.append(item.requests[0].group_id or item.requests[0].request_id)
        except BaseException:
            self._abort(submitted)
            raise

    def _run(self, request_ids: list[str], use_tqdm: UseTqdm) -> list[RequestOutput]:
        """Step the engine until these requests have ended. Whatever goes wrong, they are gone afterwards."""
        engine = self.llm_engine
        waiting = set(request_ids) - self._finished.keys()
        try:
            with (
                interrupt_between_steps() as check_interrupt,
                progress_bar(use_tqdm, "Processed prompts", len(request_ids), "prompt") as bar,
            ):
                speed = SpeedDisplay(bar)
                for request_id in request_ids:
                    if request_id in self._finished:
                        speed.add(self._finished[request_id])
                while waiting:
                    if not engine.has_unfinished_requests():
                        raise EngineDeadError(f"The engine lost the requests {', '.join(sorted(waiting))}.")
                    for output in engine.step():
                        if output.finished:
                            self._finished[output.request_id] = output
                            if output.request_id in waiting:
                                waiting.remove(output.request_id)
                                speed.add(output)
                    check_interrupt()
        except BaseException:
            self._abort(waiting)
            for request_id in request_ids:
                self._finished.pop(request_id, None)
            raise
        outputs = [self._finished.pop(request_id) for request_id in request_ids]
        for output in outputs:
            if output.error is not None:
                logger.error("Request %s failed: %s", output.request_id, output.error)
        return outputs

    def _abort(self, request_ids: Collection[str]) -> None:
        """Take requests out of the engine on the way out of a failure, which is what the user must see."""
        try:
            self.llm_engine.abort(list(request_ids))
        except Exception:
            logger.exception("Requests could not be aborted.")


def _one_for_each(name: str, value: _T | Sequence[_T], count: int) -> Sequence[_T]:
    if isinstance(value, list | tuple):
        if len(value) != count:
            raise InvalidRequestError(
                f"{name} has {len(value)} entries for {count} prompts; give one for each, or one for all.",
                param=name,
            )
        return value
    return [cast(_T, value)] * count


def _terms_of_each(
    priority: int | Sequence[int] | None,
    terms: SchedulingTerms | Sequence[SchedulingTerms] | None,
    count: int,
) -> Sequence[SchedulingTerms]:
    """The scheduling terms of each prompt, in whichever way a call states them."""
    if terms is None:
        priorities = _one_for_each("priority", 0 if priority is None else priority, count)
        return [SchedulingTerms(priority=each) for each in priorities]
    if priority is not None:
        raise InvalidRequestError(
            "priority and scheduling_terms are both given; put the priority into the terms.", param="priority"
        )
    return _one_for_each("scheduling_terms", terms, count)


def _as_conversations(
    messages: Sequence[Message] | Sequence[Sequence[Message]],
) -> Sequence[Sequence[Message]]:
    """One conversation or several, as several; what they hold is checked when they are rendered."""
    several = isinstance(messages, list | tuple) and messages and isinstance(messages[0], list | tuple)
    return cast("Sequence[Sequence[Message]]", messages if several else [messages])


def _refuse_options(
    lora_request: object = None, tokenization_kwargs: object = None, mm_processor_kwargs: object = None
) -> None:
    options = {
        "lora_request": lora_request,
        "tokenization_kwargs": tokenization_kwargs,
        "mm_processor_kwargs": mm_processor_kwargs,
    }
    for name, value in options.items():
        if value:
            raise UnsupportedError(f"{name} is not supported yet; leave it out.", param=name)


def _read_chat_template(chat_template: str | Path | None) -> str | None:
    """Jinja source as it is, or out of the file that is named."""
    if chat_template is None:
        return None
    if isinstance(chat_template, Path) or not any(sign in chat_template for sign in "{}\n"):
        path = Path(chat_template)
        try:
            return path.read_text(encoding="utf-8")
        except OSError as error:
            raise ConfigError(
                f"chat_template={str(chat_template)!r} is neither Jinja source nor a file that can be read "
                f"({error.strerror}).",
                param="chat_template",
            ) from error
    return chat_template
