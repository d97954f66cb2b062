"""How many KV pages fit: from measured free memory, the weights, and what a step needs besides.

Everything is of one device: where several share a model, `model` and `specs` are what one of them holds
(`jaxllm.models.fitting.shard_of`, `shard_specs`), and each has its part of every page.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from jaxllm.config import EngineConfig
from jaxllm.errors import InsufficientMemoryError
from jaxllm.execution.abstract import is_read_in_rows
from jaxllm.execution.platform import free_memory
from jaxllm.models.attention_kind import cache_bytes_per_token
from jaxllm.models.config import ModelConfig
from jaxllm.models.parameters import ParameterSpec
from pallas_kernels.ragged_paged_attention import Backend

logger = logging.getLogger(__name__)

_CPU_SHARE = 8  # on a CPU the cache takes one part in eight of all memory, or less if so much is not free
_CPU_SEQUENCES = 2  # and no more than this many times what max_num_seqs full sequences could fill


def page_bytes(model: ModelConfig, page_size: int, dtype: jnp.dtype, backend: Backend = "xla") -> int:
    """Bytes of one KV page over all layers, as the attention backend has it held."""
    return model.num_layers * page_size * cache_bytes_per_token(model, backend, jnp.dtype(dtype))


def weight_bytes(specs: Mapping[str, ParameterSpec], dtype: jnp.dtype, backend: Backend = "xla") -> int:
    """Bytes of all parameters, as they are held beside an attention backend."""
    return sum(_held_size(name, spec, backend) for name, spec in specs.items()) * dtype.itemsize


def _held_size(name: str, spec: ParameterSpec, backend: Backend) -> int:
    """Elements; a TPU fills rows that are read as they lie up to whole lanes of 128."""
    if backend != "tpu" or not is_read_in_rows(name):
        return spec.size
    return spec.size // spec.shape[-1] * (-(-spec.shape[-1] // 128) * 128)


def step_bytes(config: EngineConfig, model: ModelConfig, dtype: jnp.dtype) -> int:
    """An estimate, from above, of what the largest step holds besides weights and cache."""
    tokens, seqs = config.max_num_batched_tokens or 0, config.max_num_seqs or 0
    width = 6 * model.hidden_size + 4 * model.intermediate_size
    if model.mla is None:
        width += 4 * (model.num_heads + 2 * model.num_kv_heads) * model.head_dim
    else:  # queries in both forms, and outputs in latents
        width += 4 * (model.num_heads * (model.head_dim + 2 * model.mla.width) + model.mla.width)
    if model.moe is not None:  # a row for each expert that a token takes: sorted, inner, and summed
        rows = 4 * model.hidden_size + 3 * model.moe.intermediate_size
        taken: float = model.moe.experts_per_token
        if config.enable_expert_parallel and config.data_parallel_size > 1:
            # What a round of the exchange brings besides: blocks twice the mean (`expert_exchange`).
            taken += 2 * taken / config.tensor_parallel_size
        width += int(taken * rows) + 4 * model.moe.shared_intermediate_size
    sampler_state = (seqs + 1) * model.vocab_size * (4 + 4 + 1)
    logits = 6 * max(seqs, 64) * model.vocab_size * 4
    return tokens * width * max(dtype.itemsize, 4) + logits + sampler_state


def num_kv_pages(
    config: EngineConfig,
    model: ModelConfig,
    dtype: jnp.dtype,
    specs: Mapping[str, ParameterSpec],
    devices: Sequence[jax.Device],
    backend: Backend = "xla",
) -> int:
    """Pages of the KV cache, with the null page; as many as the fullest device holds its parts of.

    Args:
        backend: of attention, which decides how the cache is held.

    Raises:
        InsufficientMemoryError: not even one sequence of max_model_len tokens would fit.
    """
    page = page_bytes(model, config.block_size, dtype, backend)
    per_sequence = math.ceil((config.max_model_len or 1) / config.block_size)
    if config.num_gpu_blocks_override is not None:
        pages, basis = config.num_gpu_blocks_override, "num_gpu_blocks_override"
        remedy = "raise num_gpu_blocks_override"
    elif config.kv_cache_memory_bytes is not None:
        pages, basis = config.kv_cache_memory_bytes // page, "kv_cache_memory_bytes"
        remedy = "raise kv_cache_memory_bytes"
    else:
        total, free = min((free_memory(device) for device in devices), key=lambda memory: memory[1])
        needed = weight_bytes(specs, dtype, backend) + step_bytes(config, model, dtype)
        less = f"less {_gib(needed)} for weights and a step"
        remedy = "lower max_num_seqs or max_num_batched_tokens, or set kv_cache_memory_bytes"
        if devices[0].platform == "cpu":
            # Simulated devices have one memory between them.
            total, free = total // len(devices), free // len(devices)
            pages = _steady(total, free - needed) // page
            basis = f"a share of {_gib(total)} of which {_gib(free)} are free, {less}"
            enough = _CPU_SEQUENCES * per_sequence * (config.max_num_seqs or 1)
            if pages > enough:
                pages, basis = enough, f"{_CPU_SEQUENCES} x max_num_seqs x max_model_len"
        else:
            allowed = min(free, int(total * config.gpu_memory_utilization) - (total - free))
            pages = (allowed - needed) // page
            basis = f"gpu_memory_utilization={config.gpu_memory_utilization} of {_gib(total)}, {less}"
            remedy = f"raise gpu_memory_utilization, {remedy}"
    if pages < per_sequence:
        fits = max(int(pages), 0) * config.block_size
        raise InsufficientMemoryError(
            f"The KV cache ({basis}) would hold {fits} tokens, and one sequence of max_model_len="
            f"{config.max_model_len} needs {per_sequence * config.block_size} ({_gib(per_sequence * page)}). "
            + (
                f"Pass a smaller max_model_len (at most {fits}), or {remedy}."
                if fits
                else f"{_sentence(remedy)}."
            )
        )
    tokens = int(pages) * config.block_size
    logger.info(
        "KV cache: %s tokens in %s pages of %s (%s on each device, %s)",
        f"{tokens:,}",
        f"{pages:,}",
        config.block_size,
        _gib(pages * page),
        basis,
    )
    logger.info(
        "Maximum concurrency for %s tokens per request: %.2fx",
        f"{config.max_model_len:,}",
        tokens / (config.max_model_len or 1),
    )
    return int(pages) + 1


def num_host_pages(
    config: EngineConfig, model: ModelConfig, dtype: jnp.dtype, backend: Backend = "xla"
) -> int:
    """Pages that each replica's part of `swap_space` holds; none where who is preempted computes again."""
    if config.preemption_mode == "recompute":
        return 0
    size = int(config.swap_space * 2**30) // config.data_parallel_size
    return size // page_bytes(model, config.block_size, dtype, backend)


def _steady(total: int, free: int) -> int:
    """Bytes for a CPU's cache: a share of all memory, halved until it takes at most half of what is free.

    What is free differs from start to start, and the steps compiled last time are found again only for
    the same number of pages.
    """
    share = total // _CPU_SHARE
    while share > max(free, 0) // 2:
        share //= 2
    return share


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"
