"""What the scheduler checks: its limits, its requests, a step's result, and its own accounts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import pairwise

from jaxllm.config import SchedulerConfig
from jaxllm.errors import ConfigError, InvalidRequestError
from jaxllm.request import Request, RequestStatus
from jaxllm.scheduling.block_pool import IntegrityError
from jaxllm.scheduling.plan import Plan, StepResult
from jaxllm.scheduling.sequence import ScheduledSequence, WaitingQueue, ceil_div


def check_config(config: SchedulerConfig) -> None:
    """Check that the limits can be kept together.

    Raises:
        ConfigError: naming the one that cannot.
    """
    for name in ("max_num_seqs", "max_num_batched_tokens", "page_size", "num_stages"):
        value = getattr(config, name)
        if value < 1:
            raise ConfigError(f"{name} is {value}; it must be at least 1.", param=name)
    if config.num_host_pages < 0:
        raise ConfigError(
            f"num_host_pages is {config.num_host_pages}; it must be at least 0, which is no swapping.",
            param="num_host_pages",
        )
    if config.max_model_len < 2:
        raise ConfigError(
            f"max_model_len is {config.max_model_len}; it must be at least 2, for a prompt token and an "
            "output token.",
            param="max_model_len",
        )
    threshold = config.long_prefill_token_threshold
    if threshold < 0:
        raise ConfigError(
            f"long_prefill_token_threshold is {threshold}; it must be at least 0, which is no limit.",
            param="long_prefill_token_threshold",
        )
    if config.enable_chunked_prefill:
        return
    if threshold:
        raise ConfigError(
            f"long_prefill_token_threshold is {threshold}, which cuts prompts into chunks, but "
            "enable_chunked_prefill is False; set one of them back.",
            param="long_prefill_token_threshold",
        )
    if config.max_num_batched_tokens < config.max_model_len:
        raise ConfigError(
            f"max_num_batched_tokens is {config.max_num_batched_tokens}; without chunked prefill it must "
            f"be at least max_model_len, {config.max_model_len}.",
            param="max_num_batched_tokens",
        )


def check_request(request: Request, config: SchedulerConfig, *, taken: bool) -> int:
    """Prompt and output tokens at which a request ends, if it can be served.

    Args:
        taken: whether an unfinished request has the same id.

    Raises:
        InvalidRequestError: it can never be served.
    """
    if taken:
        raise InvalidRequestError(
            f"request_id {request.request_id!r} is taken by a request that has not finished; choose another.",
            param="request_id",
        )
    if request.status is not RequestStatus.WAITING:
        raise InvalidRequestError(
            f"Request {request.request_id!r} has been served before (it is {request.status.name}); "
            "make a new one."
        )
    num_prompt_tokens, limit = request.num_prompt_tokens, config.max_model_len
    if request.pooling_params is not None:
        # What it is for takes no place: as if a token followed that is never computed.
        limit += 1
    if not 1 <= num_prompt_tokens < limit:
        raise InvalidRequestError(
            f"The prompt has {num_prompt_tokens} tokens; from 1 to {limit - 1} are allowed, as "
            f"max_model_len is {config.max_model_len}"
            + (" and one token has to be generated." if request.pooling_params is None else "."),
            param="prompt",
        )
    if request.max_tokens < 1:
        raise InvalidRequestError(
            f"max_tokens is {request.max_tokens}; at least 1 is needed.", param="max_tokens"
        )
    max_length = min(num_prompt_tokens + request.max_tokens, limit)
    # The last token is sampled, and never computed.
    num_pages = ceil_div(max_length - 1, config.page_size)
    num_usable_pages = config.num_pages - 1
    if num_pages > num_usable_pages:
        raise InvalidRequestError(
            f"{num_prompt_tokens} prompt tokens and {max_length - num_prompt_tokens} output tokens "
            f"need {num_pages} KV pages of {config.page_size} tokens, and the cache has "
            f"{num_usable_pages}. Lower max_tokens, shorten the prompt, or give the KV "
            "cache more memory.",
            param="max_tokens",
        )
    return max_length


def check_result(plan: Plan, result: StepResult) -> None:
    """Check that a result has what its plan asked for, before anything is changed.

    Raises:
        ValueError: it has not.
    """
    rows = len(plan.scheduled)
    if len(result.token_ids) != rows or len(result.logprobs) != rows:
        raise ValueError(
            f"plan {plan.step_id} has {rows} rows, its result {len(result.token_ids)} rows of tokens and "
            f"{len(result.logprobs)} of logprobs"
        )
    for entry, token_ids in zip(plan.scheduled, result.token_ids, strict=True):
        if entry.samples and not token_ids and entry.request.pooling_params is None:
            raise ValueError(f"plan {plan.step_id} samples {entry.request.request_id!r}, its result does not")


def check_places(
    sequences: Mapping[str, ScheduledSequence],
    running: list[ScheduledSequence],
    queue: WaitingQueue,
    max_num_seqs: int,
) -> None:
    """Check that every unfinished sequence either runs or waits, in order.

    Raises:
        IntegrityError: saying what is wrong.
    """
    waiting = list(queue)
    if any(first.key > second.key for first, second in pairwise(running)):
        raise IntegrityError("the running requests are out of order")
    if len(waiting) != len(queue):
        raise IntegrityError(f"{len(queue)} requests are said to wait, {len(waiting)} do")
    places = [sequence.request.request_id for sequence in (*running, *waiting)]
    if sorted(places) != sorted(sequences):
        raise IntegrityError(f"requests {sorted(sequences)} are in these places: {sorted(places)}")
    if len(running) > max_num_seqs:
        raise IntegrityError(f"{len(running)} requests run, {max_num_seqs} may")
    for sequence in waiting:
        request = sequence.request
        if request.pages or request.num_computed_tokens or request.status is RequestStatus.RUNNING:
            raise IntegrityError(f"{request.request_id!r} waits, but has pages, progress or runs")


def check_progress(
    sequence: ScheduledSequence,
    in_flight: Iterable[tuple[Plan, list[ScheduledSequence]]],
    page_size: int,
) -> None:
    """Check one running sequence against its pages and the outstanding plans.

    Raises:
        IntegrityError: saying what is wrong.
    """
    request = sequence.request
    name = repr(request.request_id)
    if request.status is not RequestStatus.RUNNING:
        raise IntegrityError(f"{name} is among the running requests as {request.status}")
    if not 0 < request.num_computed_tokens <= request.num_tokens <= sequence.max_length:
        raise IntegrityError(
            f"{name}: computed {request.num_computed_tokens}, existing {request.num_tokens} and most "
            f"{sequence.max_length} tokens must be in this order"
        )
    if len(request.pages) != ceil_div(request.num_computed_tokens, page_size):
        raise IntegrityError(
            f"{name} has {len(request.pages)} pages for {request.num_computed_tokens} tokens"
        )
    num_pending = sum(
        entry.samples
        for plan, sequences in in_flight
        for owner, entry in zip(sequences, plan.scheduled, strict=True)
        if owner is sequence
    )
    if num_pending != request.num_pending_tokens:
        raise IntegrityError(
            f"{name} counts {request.num_pending_tokens} pending tokens; plans hold {num_pending}"
        )
