"""Fills in what an `EngineConfig` leaves open, from the model and the platform."""

from __future__ import annotations

import logging
import math
from dataclasses import replace

from jaxllm.config import EngineConfig
from jaxllm.errors import ConfigError
from jaxllm.execution.platform import Platform
from jaxllm.models.config import ModelConfig

logger = logging.getLogger(__name__)

_COUNTS = (
    "block_size",
    "max_model_len",
    "max_num_seqs",
    "max_num_batched_tokens",
    "kv_cache_memory_bytes",
    "num_gpu_blocks_override",
)


def resolve(config: EngineConfig, model: ModelConfig, platform: Platform) -> EngineConfig:
    """The configuration with every None replaced.

    Raises:
        ConfigError: a value that is out of range or contradicts the model or another value.
    """
    for name in ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size"):
        _at_least_one(name, getattr(config, name))
    if config.pipeline_parallel_size > model.num_layers:
        raise ConfigError(
            f"pipeline_parallel_size={config.pipeline_parallel_size} is more than the {model.num_layers} "
            f"layers of {model.architecture}; pass at most that.",
            param="pipeline_parallel_size",
        )
    if config.enable_expert_parallel and model.moe is None:
        raise ConfigError(
            f"enable_expert_parallel=True, and {model.architecture} has no experts; leave it out.",
            param="enable_expert_parallel",
        )
    for name in _COUNTS:
        if getattr(config, name) is not None:
            _at_least_one(name, getattr(config, name))
    if not 0 < config.gpu_memory_utilization <= 1:
        raise ConfigError(
            f"gpu_memory_utilization={config.gpu_memory_utilization} must be above 0 and at most 1.",
            param="gpu_memory_utilization",
        )
    if not 0 <= config.swap_space < math.inf:
        raise ConfigError(
            f"swap_space={config.swap_space} must be GiB of at least 0, which is none.", param="swap_space"
        )
    if config.preemption_mode == "swap" and not config.swap_space:
        raise ConfigError(
            "preemption_mode='swap' needs memory of the host to swap to; set swap_space to so many GiB.",
            param="preemption_mode",
        )
    if config.max_logprobs < -1:
        raise ConfigError(
            f"max_logprobs={config.max_logprobs} must be -1 (no limit) or more.", param="max_logprobs"
        )
    if config.max_model_len is not None and config.max_model_len > model.max_position_embeddings:
        raise ConfigError(
            f"max_model_len={config.max_model_len} is beyond the {model.max_position_embeddings} positions "
            f"that the model was made for ({model.architecture}). Pass at most that, or set "
            "max_position_embeddings or a rope scaling through hf_overrides.",
            param="max_model_len",
        )
    max_model_len = config.max_model_len or model.max_position_embeddings
    budget = config.max_num_batched_tokens
    default_max_num_seqs = min(platform.default_max_num_seqs, budget or platform.default_max_num_seqs)
    max_num_seqs = config.max_num_seqs or default_max_num_seqs
    chunked_prefill = config.enable_chunked_prefill and not model.bidirectional
    if budget is None:
        budget = max(min(platform.default_max_num_batched_tokens, max_model_len * max_num_seqs), max_num_seqs)
        if not chunked_prefill:
            budget = max(budget, max_model_len)
    if budget < max_num_seqs:
        raise ConfigError(
            f"max_num_batched_tokens={budget} is less than max_num_seqs={max_num_seqs}, so that not every "
            "running request could get a token in a step. Raise the one or lower the other.",
            param="max_num_batched_tokens",
        )
    if not chunked_prefill and budget < max_model_len:
        remedy = "lower max_model_len" if model.bidirectional else "leave enable_chunked_prefill on"
        raise ConfigError(
            f"max_num_batched_tokens={budget} is less than max_model_len={max_model_len}, and without "
            f"chunked prefill a prompt is computed in one step. Raise it, or {remedy}.",
            param="max_num_batched_tokens",
        )
    prefix_caching = config.enable_prefix_caching
    if prefix_caching and model.rope is not None and model.rope.scaling == "dynamic":
        logger.warning(
            "prefix caching is off: with dynamic rope scaling keys depend on the length of the prompt"
        )
        prefix_caching = False
    if model.bidirectional:
        # What a token becomes depends on those behind it: no prefix can be reused, and no chunk be first.
        prefix_caching = False
        if config.long_prefill_token_threshold:
            raise ConfigError(
                f"long_prefill_token_threshold={config.long_prefill_token_threshold}: {model.architecture} "
                "computes every prompt in one step; leave it out.",
                param="long_prefill_token_threshold",
            )
    return replace(
        config,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget,
        enable_prefix_caching=prefix_caching,
        enable_chunked_prefill=chunked_prefill,
        runner="generate" if model.pooler is None else "pooling",
        dtype=resolve_dtype(config.dtype, model, platform),
    )


def resolve_dtype(dtype: str, model: ModelConfig, platform: Platform) -> str:
    """ "auto", "half" and "float" to a dtype's name; raises ConfigError for an unknown one."""
    names = {
        "half": "float16",
        "float": "float32",
        "float32": "float32",
        "float16": "float16",
        "bfloat16": "bfloat16",
    }
    if dtype == "auto":
        return model.dtype if platform.checkpoint_dtype and model.dtype in names else "float32"
    if dtype not in names:
        raise ConfigError(f"dtype={dtype!r}; there are auto, {', '.join(names)}.", param="dtype")
    return names[dtype]


def _at_least_one(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name}={value!r} must be an integer of at least 1.", param=name)
