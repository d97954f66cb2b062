"""Replicas of attention and cache in one engine, with experts between them: the tokens of one device."""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from jaxllm import LLM, SamplingParams
from jaxllm.errors import ConfigError
from jaxllm.execution.abstract import (
    abstract_cache,
    abstract_parameters,
    abstract_state,
    lower_step,
)
from jaxllm.execution.batch import StepShape
from jaxllm.execution.sampler import SamplerState
from jaxllm.execution.step import step
from jaxllm.layers.expert_exchange import block_size, exchange
from jaxllm.models.blocks import DecoderForm
from jaxllm.models.config import ModelConfig, MoEConfig
from jaxllm.models.decoder import Decoder
from jaxllm.models.families import translate_config
from jaxllm.scheduling import Plan, ReplicatedScheduler, load_policy
from jaxllm.scheduling.recording.schedule import Schedule, read_schedule
from jaxllm.scheduling.simulator import simulate
from sharding import make_mesh, on_shards
from tests.layers.test_moe import HIDDEN, expected, make_layer
from tests.parallel.eight_devices import collectives
from tests.parallel.eight_devices.same_tokens import (
    BIAS,
    OUTPUT,
    make_llm,
    serve,
    use_one_shape,
    use_two_shapes,
)
from tests.parallel.hlo import collectives as count_collectives
from tests.parallel.hlo import copies_of, parse, replica_groups
from tests.parallel.models import Oracle, hf_config, write_model

LENGTHS = (21, 18, 5, 23, 9, 20, 16)
MOE = MoEConfig(8, 3, 24, (0, 1, 2), True, 16)


# The exchange


@functools.cache
def exchanged(block: int) -> Any:
    """Each expert multiplies by a number of its own: four replicas of two devices, two experts on each."""
    mesh = make_mesh(data=4, tensor=2)

    def of_device(x: jax.Array, chosen: jax.Array, is_real: jax.Array, factors: jax.Array) -> jax.Array:
        device = chosen // 2
        mine = exchange(
            lambda rows, expert: rows * jnp.append(factors, 1e6)[expert][:, None],
            x,
            jnp.where(is_real[:, None] & (device % 2 == jax.lax.axis_index("tensor")), device // 2, 4),
            chosen % 2,
            num_experts=2,
            block=block,
            most=chosen.size,
            axis="data",
            in_step=("data", "tensor"),
        )
        return jax.lax.psum(mine, "tensor")

    split, whole = PartitionSpec("data"), PartitionSpec(("data", "tensor"))
    return jax.jit(on_shards(of_device, mesh, (split, split, split, whole), split))


@pytest.mark.parametrize("block", [3, 14])
@pytest.mark.parametrize("routing", ["random", "one expert", "one device", "nobody"])
def test_every_row_comes_back_from_its_expert(routing: str, block: int) -> None:
    """In rounds of small blocks, and in one of all that there may be."""
    tokens, each = 4 * 7, 2
    rng = np.random.default_rng(block)
    x = rng.standard_normal((tokens, 3), np.float32)
    factors = np.arange(1, 17, dtype=np.float32)
    first, count = {"one expert": (11, 1), "one device": (6, 2)}.get(routing, (0, 16))
    chosen = first + rng.integers(count, size=(tokens, each))
    is_real = rng.random(tokens) < (0 if routing == "nobody" else 0.8)
    expected = np.where(is_real[:, None, None], x[:, None] * factors[chosen][..., None], 0)
    np.testing.assert_array_equal(exchanged(block)(x, chosen, is_real, factors), expected)


def test_blocks_are_twice_the_mean_and_never_more_than_could_be() -> None:
    assert block_size(64 * 8, 64 * 8, 8) == 128
    assert block_size(4 * 8, 4 * 8, 8) == 32
    assert block_size(3, 3, 8) == 3
    assert block_size(1000, 700, 2) == 700


@pytest.mark.parametrize(("data", "tensor", "shared"), [(4, 1, 0), (2, 4, 8)])
def test_a_layer_of_experts_on_the_devices_of_all_replicas(data: int, tensor: int, shared: int) -> None:
    """Against float64, also where all tokens want the same experts, and where replicas have none."""
    experts, per_token, tokens = 8, 3, 50
    layer, weights = make_layer(experts, per_token, normalize=True, shared=shared)
    graph, state = nnx.split(layer)
    form = {"split_over": "tensor" if tensor > 1 else None, "exchange_over": "data", "expert_parallel": True}

    def of_device(state: Any, x: jax.Array, num_tokens: jax.Array) -> jax.Array:
        own = nnx.merge(graph, state)
        for name, value in form.items():
            setattr(own, name, value)
        return own(x, num_tokens[0])

    def split(path: Any, _: Any) -> PartitionSpec:
        names = jax.tree_util.keystr(path)
        over = ("data", "tensor")
        if "experts" in names:
            return PartitionSpec(None, over) if "gate_up" in names else PartitionSpec(over)
        if "'shared'" in names:
            return PartitionSpec(None, "tensor")
        return PartitionSpec()

    specs = jax.tree_util.tree_map_with_path(split, state)
    batch = PartitionSpec("data")
    mesh = make_mesh(data=data, tensor=tensor)
    run = jax.jit(on_shards(of_device, mesh, (specs, batch, batch), batch))
    rng = np.random.default_rng(data)
    for x in (
        rng.standard_normal((data * tokens, HIDDEN), np.float32),
        np.repeat(rng.standard_normal((1, HIDDEN), np.float32), data * tokens, axis=0),
    ):
        counts = rng.integers(tokens, size=data).astype(np.int32)
        counts[0] = 0
        out = np.asarray(run(state, x, counts)).reshape(data, tokens, HIDDEN)
        for replica, count in enumerate(counts):
            mine = x.reshape(data, tokens, HIDDEN)[replica, :count]
            exact = expected(mine, weights, per_token, normalize=True)
            # Three float32 products in a row.
            assert np.linalg.norm(out[replica, :count] - exact) <= 1e-6 * np.linalg.norm(exact)


# What the compiled steps say to one another


def compiled(model: ModelConfig, data: int, tensor: int, shape: StepShape, *, cpu_form: bool = False) -> str:
    form = DecoderForm(
        jnp.dtype("float32"),
        cpu_form,
        not cpu_form,
        "xla",
        make_mesh(data=data, tensor=tensor),
        expert_parallel=model.moe is not None,
    )
    decoder = Decoder(model, form)
    vocabulary = decoder.fitted.vocab_size
    state = functools.partial(SamplerState.create, collectives.SLOTS, vocabulary, data)
    lowered = lower_step(
        functools.partial(step, decoder=decoder, shape=shape, num_logprobs=5, logprobs_mode="raw_logprobs"),
        decoder,
        abstract_parameters(decoder),
        abstract_cache(decoder, collectives.PAGES, collectives.PAGE_SIZE),
        abstract_state(state, form.mesh),
        shape,
    )
    return lowered.compile().as_text() or ""


def test_replicas_of_a_dense_model_say_nothing_to_one_another() -> None:
    text = compiled(collectives.MODEL, 2, 2, collectives.MIXED, cpu_form=True)
    module = parse(text)
    [layer] = module.loops_over(collectives.cache_shape(2))
    assert count_collectives(layer) == Counter({"all-reduce": 2})
    groups = replica_groups(text)
    assert len(groups) == sum(count_collectives(module.instructions).values()) > 2
    # Devices 0 and 1 are the one replica, 2 and 3 the other.
    assert {frozenset(one) for group in groups for one in group} == {frozenset({0, 1}), frozenset({2, 3})}
    assert copies_of(module.instructions, {collectives.cache_shape(2), collectives.cache_shape(1)}) == []


def test_experts_of_replicas_exchange_rows_and_nothing_else() -> None:
    """With 80 tokens a device may get 240 rows of another one, and a block has 120: so there are rounds."""
    model = replace(collectives.MODEL, moe=MOE)
    module = parse(compiled(model, 2, 2, StepShape(80, 5, 7, False)))
    [layer] = module.loops_over(collectives.cache_shape(2))
    # Tokens and the numbers of their experts there, results back; two sums, and how many rounds all make.
    assert count_collectives(layer) == Counter({"all-to-all": 3, "all-reduce": 3})
    matrices = {(2, 2, 40, 24), (2, 24, 40), (4, 40, 24)}
    matrices |= {(collectives.LAYERS, *sizes) for sizes in matrices}
    shapes = {collectives.shape_of(*sizes) for sizes in matrices} | {collectives.cache_shape(2)}
    assert copies_of(module.instructions, shapes) == []


# Engines


@pytest.fixture
def one_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    use_one_shape(monkeypatch)


def load(tmp: Path, name: str, **changes: Any) -> tuple[Path, Oracle]:
    directory = write_model(tmp / name, name, **changes)
    return directory, Oracle(directory, translate_config(hf_config(name, **changes)))


def draw(llm: LLM) -> list[list[list[int]]]:
    """Tokens of requests that ask for everything that the sampler can do."""
    rng = np.random.default_rng(1)
    prompts = [rng.integers(601, size=length).tolist() for length in LENGTHS]
    common: dict[str, Any] = {"max_tokens": OUTPUT, "ignore_eos": True, "detokenize": False}
    params = [
        SamplingParams(**common, seed=1, n=2),
        SamplingParams(**common, seed=2, top_p=0.8, min_p=0.01, temperature=1.3),
        SamplingParams(**common, temperature=0, repetition_penalty=1.7, presence_penalty=0.5),
        SamplingParams(**common, seed=3, top_k=20, frequency_penalty=1.0),
        SamplingParams(**common, temperature=0, repetition_penalty=0.6),
        SamplingParams(**common, seed=5, logit_bias=BIAS),
        SamplingParams(**common, seed=6, allowed_token_ids=[1, 5, 300, 600]),
    ]
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    return [[list(one.token_ids) for one in output.outputs] for output in outputs]


def check_recorded(read: Schedule, count: int) -> None:
    """The first `count` requests, which were there before the first step, and the plans for them."""
    recorded = [
        sorted((row.request.number, *row[1:]) for row in rows if row.request.replica == replica)
        for rows in (list(read.rows(step)) for step in range(len(read.steps)))
        for replica in range(2)
    ]
    recorded = [rows for rows in recorded if rows and rows[0][0] < count]
    plans: list[list[tuple[int, int, int, bool]]] = []

    class Plans:
        def seconds(self, plan: Plan) -> float:
            plans.append(sorted((int(e.request.request_id), *e[1:]) for e in plan.scheduled))
            return 1.0

    traced = [read.trace()[number] for number in range(count)]
    at_once = [type(t)(0.0, t.segments, t.output_len, t.terms, t.output_name) for t in traced]
    simulate(at_once, read.config, Plans(), load_policy("fcfs"), max_in_flight=read.header["max_in_flight"])
    assert plans == recorded


def test_two_replicas_of_one_device(tmp_path: Path) -> None:
    """With a step that only decodes, too; and its record, simulated, gives the plans that it made."""
    directory, oracle = load(tmp_path, "llama")
    schedule = tmp_path / "schedule.gz"
    llm = make_llm(directory, 1, data_parallel_size=2, record_schedule=schedule)
    try:
        prompts = [{"prompt_token_ids": [n, *range(1, 4 * n)]} for n in (5, 2, 4, 4, 3, 5, 2, 4)]
        params = SamplingParams(temperature=0, max_tokens=OUTPUT, ignore_eos=True, detokenize=False)
        llm.generate(prompts, params, use_tqdm=False)
        serve(llm, oracle, LENGTHS)
        stats = llm.llm_engine.stats()
        assert stats.num_preemptions > 0 and stats.prefix_cache_hits > 0
        hits = {
            m.labels["engine"]: m.value for m in llm.get_metrics() if m.name == "jaxllm:prefix_cache_hits"
        }
        assert set(hits) == {"0", "1"} and sum(hits.values()) == stats.prefix_cache_hits
        # Asleep and awake again, with nothing cached; and one request, so that the other replica pads.
        assert llm.reset_prefix_cache()
        llm.sleep(level=1)
        llm.wake_up()
        prompt = np.random.default_rng(2).integers(601, size=13).tolist()
        for _ in range(2):
            [output] = llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
            assert list(output.outputs[0].token_ids) == oracle.greedy(prompt, OUTPUT)
        tokens = draw(llm)
    finally:
        llm.shutdown()
    check_recorded(read_schedule(schedule), len(prompts))
    llm = make_llm(directory, 1)
    try:
        assert draw(llm) == tokens
    finally:
        llm.shutdown()


def test_two_pipelines_of_two_devices_a_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Preempted requests are kept in the host's memory; all draw what they would on one device."""
    use_two_shapes(monkeypatch)
    directory, oracle = load(tmp_path, "llama")
    limits: dict[str, Any] = {"max_num_seqs": 4, "num_gpu_blocks_override": 19, "swap_space": 0.01}
    llm = make_llm(directory, 2, data_parallel_size=2, pipeline_parallel_size=2, **limits)
    try:
        serve(llm, oracle, LENGTHS * 2)
        assert cast(ReplicatedScheduler, llm.llm_engine.scheduler).num_swaps > 0
        runner = llm.llm_engine.runner
        # Every device has pages and slots of its replica, what its stage hands on, and its part of weights.
        held = {
            "cache": (runner._kv_pages, (2, 20, 4, 2, 6)),
            "counts": (runner._state.output_counts, (5, 256)),
            "hidden": (runner._hidden, (1, 48, 16)),
            "mlp": (runner._params["layers.mlp.down.weight"], (2, 48, 38)),
        }
        for name, (array, shape) in held.items():
            assert [shard.data.shape for shard in array.addressable_shards] == [shape] * 8, name
        tokens = draw(llm)
        engine, rng = llm.llm_engine, np.random.default_rng(3)
        # Aborted and ended while their batches are on their way, on either replica.
        wanted, got = {}, {}
        for number in range(14):
            prompt = rng.integers(601, size=rng.integers(3, 20)).tolist()
            wanted[str(number)] = prompt
            params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, detokenize=False)
            engine.add_request(str(number), {"prompt_token_ids": prompt}, params)
            for output in engine.step():
                got[output.request_id] = list(output.outputs[0].token_ids)
            if number % 4 == 3:
                engine.abort([str(number - 1)])
                del wanted[str(number - 1)]
        while engine.has_unfinished_requests():
            for output in engine.step():
                got[output.request_id] = list(output.outputs[0].token_ids)
        for name, prompt in wanted.items():
            oracle.check_greedy(prompt, got[name], 6)
        engine.scheduler.check_integrity()
    finally:
        llm.shutdown()
    alone = make_llm(directory, 1, max_num_seqs=8, num_gpu_blocks_override=99)
    try:
        assert draw(alone) == tokens
    finally:
        alone.shutdown()


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    directory = write_model(tmp_path, "qwen2-moe", num_experts=6)
    with pytest.raises(
        ConfigError, match=r"'experts' of size 6 .* 4 shards of the mesh axis 'data' x 'tensor'"
    ):
        make_llm(directory, 2, data_parallel_size=2, enable_expert_parallel=True)
    with pytest.raises(ConfigError, match=r"data_parallel_size=5, .*: a mesh of data=5 .* needs 10 devices"):
        make_llm(directory, 2, data_parallel_size=5)
