"""What an engine is told: frozen, in vLLM's names; `resolve` functions return a new one."""

from __future__ import annotations

import difflib
import logging
import os
import types
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import lru_cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from jaxllm.errors import ConfigError, UnsupportedError

logger = logging.getLogger(__name__)

DEMO_MODEL = "demo"


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Limits that the scheduler works within; known once the KV cache has been sized.

    Attributes:
        max_num_seqs: requests running at once.
        max_num_batched_tokens: token budget of a step.
        max_model_len: prompt and output tokens of one request.
        page_size: tokens a KV page holds.
        num_pages: pages in the cache, including the null page 0, which is never handed out.
        num_host_pages: pages in the host's memory for those who are preempted; 0 computes them again.
        long_prefill_token_threshold: a prompt computes at most this many tokens a step; 0 is no limit.
        reschedule_in_flight: whether a request may be scheduled again while its newest token is
            still on the device (overlapped execution).
        num_stages: of a pipeline. So many plans after the one that samples a request's newest token, that
            token is on the device, and no sooner may the request be scheduled again. Until then others
            keep the stages busy, among which the requests are shared out.
        data_parallel_size: replicas, each with its own requests, pages and limits: all that stands above
            is of one of them.
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    page_size: int
    num_pages: int
    num_host_pages: int = 0
    enable_prefix_caching: bool = True
    enable_chunked_prefill: bool = True
    long_prefill_token_threshold: int = 0
    policy: str = "fcfs"
    reschedule_in_flight: bool = True
    num_stages: int = 1
    data_parallel_size: int = 1


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Arguments of `LLM(...)` and flags of `python -m jaxllm.serve`; None means "decide for me".

    `jaxllm.engine.Engine.from_config` fills in what depends on the model and the platform.

    Attributes:
        model: a directory, a hub name, or "demo" for the bundled demonstration model.
        runner: "generate" text or "pooling" to vectors; "auto" goes by the model.
        convert: "embed" runs a model that generates as one that embeds, which "auto" does under
            runner="pooling"; "none" does not.
        pooler_config: how to pool instead of as the model says: pooling_type (LAST, CLS, MEAN) and
            use_activation.
        dtype: "auto" is the checkpoint's on GPU and TPU, and float32 on CPU.
        block_size: tokens per KV page.
        gpu_memory_utilization: fraction of device memory for weights, activations and KV cache.
        kv_cache_memory_bytes: size of the KV cache per device, instead of the fraction.
        swap_space: GiB of the host's memory that keep the pages of preempted requests; of several hosts each
            keeps its devices' part of them.
        preemption_mode: whether these are computed again ("recompute") or copied back ("swap"); "auto"
            copies where there is swap_space.
        max_logprobs: most logprobs a request may ask for; -1 admits the whole vocabulary.
        async_scheduling: overlap the host's work with the device's.
        tensor_parallel_size: devices that share every layer.
        data_parallel_size: replicas of attention and KV cache in one engine, each on so many devices. Limits
            (max_num_seqs, max_num_batched_tokens) and sizes of the cache are of each; swap_space they share.
        enable_expert_parallel: the devices of all replicas have whole experts, rather than those of each
            replica a part of every expert.
        record_schedule: file that every plan is written to, for `python -m jaxllm.replay`; compressed if
            its name ends in .gz.
        record_trace: file that every request is written to as it ends, for `python -m jaxllm.simulate
            --trace`; lengths, times and hashes, no text.
        nnodes: hosts that share the model, each started with the same command and a node_rank of its own.
        node_rank: which of the hosts this is; host 0 serves, the others do what it says.
        master_addr: address of host 0 that the others reach.
        master_port: port of host 0 that the others reach; the next one is taken, too.
        distributed_executor_backend: "ray" starts the other hosts through a Ray cluster that runs; "mp" is
            hosts that are started by hand, "uni" is one host.
        distributed_timeout_seconds: how long to wait for hosts to come and to load, and for a step of theirs;
            600 unless given.
        otlp_traces_endpoint: URL of an OpenTelemetry collector, which gets a span for every sequence.
        forbid_recompile: raise instead of compiling after warm-up.
        compilation_cache_dir: where compiled steps persist; "" turns the cache off.
    """

    model: str = DEMO_MODEL
    runner: Literal["auto", "generate", "pooling"] = "auto"
    convert: Literal["auto", "none", "embed", "classify"] = "auto"
    pooler_config: dict[str, Any] = field(default_factory=dict)
    tokenizer: str | None = None
    skip_tokenizer_init: bool = False
    trust_remote_code: bool = False
    dtype: str = "auto"
    seed: int = 0
    revision: str | None = None
    tokenizer_revision: str | None = None
    download_dir: str | None = None
    load_format: Literal["auto", "safetensors", "dummy", "orbax"] = "auto"
    hf_overrides: dict[str, Any] = field(default_factory=dict)
    generation_config: str = "auto"
    override_generation_config: dict[str, Any] = field(default_factory=dict)
    max_model_len: int | None = None
    max_logprobs: int = 20
    logprobs_mode: Literal["raw_logprobs", "processed_logprobs", "raw_logits", "processed_logits"] = (
        "raw_logprobs"
    )
    disable_sliding_window: bool = False
    block_size: int = 16
    gpu_memory_utilization: float = 0.92
    kv_cache_memory_bytes: int | None = None
    num_gpu_blocks_override: int | None = None
    swap_space: float = 0.0
    preemption_mode: Literal["auto", "recompute", "swap"] = "auto"
    enable_prefix_caching: bool = True
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    enable_chunked_prefill: bool = True
    long_prefill_token_threshold: int = 0
    scheduling_policy: str = "fcfs"
    scheduling_config: dict[str, Any] = field(default_factory=dict)
    async_scheduling: bool = True
    record_schedule: str | None = None
    record_trace: str | None = None
    nnodes: int = 1
    node_rank: int = 0
    master_addr: str = "127.0.0.1"
    master_port: int = 29501
    distributed_executor_backend: Literal["uni", "mp", "ray"] | None = None
    distributed_timeout_seconds: int | None = None
    otlp_traces_endpoint: str | None = None
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    data_parallel_size: int = 1
    enable_expert_parallel: bool = False
    attention_backend: str | None = None
    structured_outputs_config: dict[str, Any] = field(default_factory=dict)
    forbid_recompile: bool = False
    compilation_cache_dir: str | None = None
    disable_log_stats: bool = False

    def __post_init__(self) -> None:
        for name, (allowed, described) in _field_types().items():
            value = getattr(self, name)
            if isinstance(value, bool) and bool not in allowed:
                fits = False
            else:
                fits = value in allowed or isinstance(value, tuple(a for a in allowed if isinstance(a, type)))
            if not fits:
                raise ConfigError(f"{name}={value!r} must be {described}.", param=name)


@lru_cache(maxsize=1)
def _field_types() -> dict[str, tuple[tuple[Any, ...], str]]:
    """For each field of `EngineConfig` the types or literal values that it takes, and these in words."""
    words = {bool: "True or False", int: "an integer", float: "a number", str: "a string", dict: "a dict"}
    takes: dict[str, tuple[tuple[Any, ...], str]] = {}
    for name, hint in get_type_hints(EngineConfig).items():
        allowed: list[Any] = []
        for part in get_args(hint) if get_origin(hint) in (types.UnionType, Union) else (hint,):
            if get_origin(part) is Literal:
                allowed += get_args(part)
            else:
                allowed.append(get_origin(part) or part)
        described = " or ".join(words.get(a, repr(None if a is type(None) else a)) for a in allowed)
        # A whole number is a number, too.
        takes[name] = ((*allowed, int) if float in allowed else tuple(allowed), described)
    return takes


# Arguments of vLLM that tune torch or CUDA: there is nothing here that they could change.
NOTHING_TO_MATCH: dict[str, str] = {
    "enforce_eager": "every step is compiled ahead",
    "compilation_config": "every step is compiled ahead",
    "cudagraph_capture_sizes": "there are no CUDA graphs",
    "max_seq_len_to_capture": "there are no CUDA graphs",
    "disable_custom_all_reduce": "XLA chooses the collectives",
    "enable_sleep_mode": "every engine can sleep",
    "max_parallel_loading_workers": "weights are streamed",
}

# Other arguments of vLLM, with the values that ask for what is done anyway (so do None, False, 0 and "").
NOT_SERVED: dict[str, tuple[Any, ...]] = {
    "task": ("auto", "generate"),
    "tokenizer_mode": ("auto", "hf"),
    "config_format": ("auto", "hf"),
    "model_impl": ("auto",),
    "device": ("auto",),
    "kv_cache_dtype": ("auto",),
    "prefix_caching_hash_algo": (),
    "quantization": (),
    "quantization_config": (),
    "enable_lora": (),
    "max_loras": (1,),
    "max_lora_rank": (16,),
    "speculative_config": (),
    "spec_method": (),
    "spec_model": (),
    "spec_tokens": (),
    "logits_processors": (),
    "cpu_offload_gb": (),
    "kv_offloading_size": (),
    "kv_transfer_config": (),
    "enable_prompt_embeds": (),
    "limit_mm_per_prompt": (),
    "mm_processor_kwargs": (),
    "allowed_local_media_path": (),
    "allowed_media_domains": (),
    "profiler_config": (),
    "attention_config": (),
    "hf_token": (),
    "hf_config_path": (),
    "code_revision": (),
    "scheduler_cls": (),
    "worker_cls": ("auto",),
}


def engine_config_from(model: str | os.PathLike[str], arguments: Mapping[str, Any]) -> EngineConfig:
    """The `EngineConfig` of keyword arguments as a vLLM user writes them; None leaves a field at its default.

    Raises:
        ConfigError: an argument is unknown.
        UnsupportedError: an argument of vLLM asks for what is not served yet.
    """
    known = {f.name for f in fields(EngineConfig)} - {"model"}
    given: dict[str, Any] = {}
    for name, value in arguments.items():
        if name in known:
            if value is not None:
                given[name] = os.fspath(value) if isinstance(value, os.PathLike) else value
        elif name in NOTHING_TO_MATCH:
            logger.info("%s=%r changes nothing here: %s.", name, value, NOTHING_TO_MATCH[name])
        elif name in NOT_SERVED:
            if value and value not in NOT_SERVED[name]:
                raise UnsupportedError(
                    f"{name}={value!r} is not supported yet; leave {name} out.", param=name
                )
        else:
            close = difflib.get_close_matches(name, [*known, *NOTHING_TO_MATCH, *NOT_SERVED], n=1)
            hint = f"Did you mean {close[0]!r}?" if close else f"Known are {', '.join(sorted(known))}."
            raise ConfigError(f"There is no argument {name!r}. {hint}", param=name)
    return EngineConfig(model=os.fspath(model), **given)
