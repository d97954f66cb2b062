"""From a configuration to a runner with weights: compiling while the weights are still loading."""

from __future__ import annotations

import functools
import logging
import os
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxllm.config import EngineConfig
from jaxllm.errors import ConfigError
from jaxllm.execution.hosts.startup import Hosts, agree_on_model
from jaxllm.execution.memory import num_host_pages, num_kv_pages
from jaxllm.execution.platform import Platform, compute_capability
from jaxllm.execution.pooling import PoolingRunner
from jaxllm.execution.runner import Runner
from jaxllm.layers.attention import choose_backend
from jaxllm.layers.latent_attention import choose_latent_backend
from jaxllm.models.blocks import DecoderForm
from jaxllm.models.config import ModelConfig
from jaxllm.models.families import translate_config
from jaxllm.models.fitting import shard_of, shard_specs
from jaxllm.models.hub import read_config, resolve_model
from jaxllm.models.loader import load_parameters
from jaxllm.models.pipelined_decoder import make_decoder
from jaxllm.models.pooler_fields import resolve_pooling
from pallas_kernels.matmul import cpu as cpu_matmul
from pallas_kernels.ragged_paged_attention import Backend
from sharding import ShardingError, check_every_host_takes_part, make_mesh

logger = logging.getLogger(__name__)


def read_model(config: EngineConfig) -> tuple[Path, ModelConfig]:
    """The directory of a model, and its architecture with what the configuration changes about it."""
    path = resolve_model(config.model, config.revision, config.download_dir)
    model = translate_config(read_config(path), config.hf_overrides)
    model = resolve_pooling(
        model, path, runner=config.runner, convert=config.convert, overrides=config.pooler_config
    )
    return path, model.without_windows() if config.disable_sliding_window else model


def build_runner(
    config: EngineConfig,
    model: ModelConfig,
    path: Path,
    platform: Platform,
    *,
    progress: bool,
    hosts: Hosts | None = None,
) -> tuple[Runner, int]:
    """A runner ready for its first plan, and the number of KV pages that each replica has.

    Args:
        config: resolved.
        path: the model's directory.
        progress: show progress bars of loading and compiling.
        hosts: those that share the model, all of which build a runner; None where this one has it all.
    """
    use_compilation_cache(config.compilation_cache_dir)
    mesh = _mesh(config)
    form = DecoderForm(
        dtype=jnp.dtype(config.dtype),
        feature_major=platform.feature_major,
        stack_layers=platform.stack_layers or mesh.shape["pipe"] > 1,
        attention_backend=_attention_backend(config, model, platform),
        # One device needs no mesh, and its steps are compiled without one.
        mesh=mesh if mesh.size > 1 else None,
        expert_parallel=config.enable_expert_parallel,
    )
    if platform.name == "cpu":
        missing = cpu_matmul.missing(form.dtype)
        chosen = "cpu (compiled by numba)" if missing is None else f"xla (the portable ones; cpu {missing})"
        logger.info("products with weights: %s", chosen)
    decoder = make_decoder(model, form)
    specs = decoder.parameter_specs()
    shard = shard_of(
        decoder.fitted,
        mesh.shape["tensor"],
        form.num_stages,
        expert_parallel=config.enable_expert_parallel,
    )
    devices, backend = list(mesh.local_devices), form.attention_backend
    num_pages = num_kv_pages(config, shard, form.dtype, shard_specs(specs, mesh), devices, backend)
    if hosts is not None:
        num_pages = min(hosts.gather("pages of the KV cache", num_pages))
    runner = (Runner if model.pooler is None else PoolingRunner)(
        decoder,
        num_pages=num_pages,
        num_host_pages=num_host_pages(config, decoder.fitted, form.dtype, backend),
        page_size=config.block_size,
        max_num_seqs=config.max_num_seqs or 1,
        max_num_batched_tokens=config.max_num_batched_tokens or 1,
        max_model_len=config.max_model_len or 1,
        num_logprobs=model.vocab_size if config.max_logprobs < 0 else config.max_logprobs,
        logprobs_mode=config.logprobs_mode,
        compiler_options=platform.compiler_options,
        compile_all=config.forbid_recompile,
        samples_late=not config.skip_tokenizer_init,  # Grammars and bad words are of text.
    )
    try:
        if hosts is not None:
            agree_on_model(hosts, config, model, path, runner.compiler.programs)
        load = functools.partial(
            load_parameters,
            path,
            model,
            specs,
            dtype=config.dtype,
            mesh=mesh,
            stack_layers=form.stack_layers,
            load_format=config.load_format,
            seed=config.seed,
            progress=progress,
        )
        runner.start(load(), progress=progress)
        runner.load = load
    except BaseException:
        runner.close()
        raise
    return runner, num_pages


def _attention_backend(config: EngineConfig, model: ModelConfig, platform: Platform) -> Backend:
    """Which kernel attends, by what there is to attend to."""
    if model.mla is not None:
        return choose_latent_backend(config.attention_backend, platform.name, model.mla, compute_capability())
    return choose_backend(
        config.attention_backend, platform.name, model.head_dim, compute_capability(), config.dtype
    )


def _mesh(config: EngineConfig) -> Mesh:
    """The devices that share the model.

    Raises:
        ConfigError: there are not so many.
    """
    data, pipe = config.data_parallel_size, config.pipeline_parallel_size
    tensor = config.tensor_parallel_size
    alone = data * pipe * tensor == 1
    try:
        mesh = make_mesh(data, pipe, tensor, jax.devices()[:1] if alone else None)
        check_every_host_takes_part(mesh)
        return mesh
    except ShardingError as error:
        sizes = {"data_parallel_size": data, "pipeline_parallel_size": pipe, "tensor_parallel_size": tensor}
        asked = {name: size for name, size in sizes.items() if size > 1 or alone}
        message = ", ".join(f"{name}={size}" for name, size in asked.items())
        raise ConfigError(f"{message}: {error}.", param=next(iter(asked))) from error


def use_compilation_cache(directory: str | None) -> None:
    """Keeps compiled steps on disk between runs; "" turns that off, None is the default place.

    A cache that the user has set up for JAX already is left alone.
    """
    current = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    if directory == "" or (directory is None and current):
        return
    cache_home = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    jax.config.update("jax_compilation_cache_dir", directory or str(Path(cache_home) / "jaxllm" / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
