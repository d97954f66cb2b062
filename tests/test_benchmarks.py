"""The benchmarks measure what they say: workloads, counted costs, checkpoints, and engines as processes."""

from __future__ import annotations

import itertools
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from benchmarks import (
    attention,
    attention_peers,
    checkpoint,
    compare,
    fidelity,
    gpu_acceptance,
    kernels,
    machine,
    peers,
    profile_steps,
    shapes,
    startup,
    structured_output,
    tune,
    vocabulary,
)
from benchmarks.attention import LAYERS
from benchmarks.cost import ModelCost
from benchmarks.workloads import STANDARD, Workload, parse_workload
from jaxllm.demo import demo_model_path
from jaxllm.execution.buckets import step_shapes
from jaxllm.models.config import ModelConfig, MoEConfig
from jaxllm.models.families import translate_config
from jaxllm.scheduling.simulator import FittedCost, Shape
from jaxllm.simulate import figures_of
from pallas_kernels.mla_ragged_paged_attention.shapes import LatentShape
from pallas_kernels.ragged_paged_attention.shapes import WORKS, LayerShape, Work
from tests.engine_shapes import every_shape

# Parameter counts that the models' cards state, in billions.
PARAMETERS = {
    "llama-135m": 0.1345,
    "llama-3.2-1b": 1.236,
    "llama-3.1-8b": 8.03,
    "llama-3.1-70b": 70.55,
    "mistral-7b": 7.24,
    "qwen3-0.6b": 0.596,
    "qwen3-8b": 8.19,
    "mixtral-8x7b": 46.7,
    "qwen3-30b-a3b": 30.53,
    "deepseek-v2-lite": 15.7,
    "deepseek-v3": 671,
}


@pytest.mark.parametrize("name", shapes.SHAPES)
def test_shapes_have_the_parameters_of_the_models(name: str) -> None:
    tensors = checkpoint.tensor_shapes(shapes.SHAPES[name])
    count = sum(int(np.prod(shape, dtype=np.int64)) for _, shape in tensors)
    assert count / 1e9 == pytest.approx(PARAMETERS[name], rel=2e-3)


workloads = st.builds(
    lambda n, length, out, shared: Workload(n, length, out, shared % length),
    st.integers(1, 5),
    st.integers(1, 20),
    st.integers(1, 6),
    st.integers(0, 19),
)


@given(workloads)
def test_workloads_survive_being_written(workload: Workload) -> None:
    text = f"{workload.num_prompts}x{workload.input_len}->{workload.output_len}"
    assert parse_workload(f"{text}/{workload.shared_len}") == workload
    if not workload.shared_len:
        assert parse_workload(text) == workload


@pytest.mark.parametrize(
    "text", ["", "8", "8x128", "0x5->5", "8x0->1", "8x8->0", "8x8->1/8", "8x8->1/9", "ax1->1"]
)
def test_malformed_workloads_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="workload"):
        parse_workload(text)


def test_prompts_share_what_they_say_and_nothing_else() -> None:
    workload = Workload(16, 512, 32, shared_len=448)
    prompts = np.array(workload.prompts(49152, seed=1))
    assert prompts.shape == (16, 512)
    assert (prompts[:, :448] == prompts[0, :448]).all()
    assert len({tuple(row) for row in prompts[:, 448:464]}) == 16
    again = np.array(workload.prompts(49152, seed=2))
    assert (again[0, :16] != prompts[0, :16]).any()
    assert workload.prompts(49152, seed=1) == prompts.tolist()


def brute_force(config: ModelConfig, workload: Workload, budget: int, size: int) -> tuple[int, int]:
    """FLOPs and bytes of a workload, one token and one layer at a time."""
    hidden, dim = config.hidden_size, config.head_dim
    matrices = [
        config.num_heads * dim * hidden,
        config.num_kv_heads * dim * hidden,
        config.num_kv_heads * dim * hidden,
        hidden * config.num_heads * dim,
        *[hidden * config.intermediate_size] * (3 if config.gated_mlp else 2),
    ]
    head = config.vocab_size * hidden
    token_kv = 2 * config.num_kv_heads * dim
    flops = moved = steps = computed = 0

    def visible(position: int, window: int | None) -> range:
        return range(max(0, position + 1 - window) if window else 0, position + 1)

    for prompt in range(workload.num_prompts):
        for position in range(workload.input_len):
            if prompt and position < workload.shared_len:
                continue
            computed += 1
            for window in config.layer_windows:
                flops += sum(2 * m for m in matrices)
                flops += 4 * config.num_heads * dim * len(visible(position, window))
                moved += token_kv
        if prompt and workload.shared_len:
            moved += sum(token_kv * len(visible(workload.shared_len - 1, w)) for w in config.layer_windows)
        flops += 2 * head
    while computed > 0:
        computed -= budget
        moved += len(config.layer_windows) * sum(matrices) + (0 if steps else head)
        steps += 1
    for output in range(1, workload.output_len):
        moved += len(config.layer_windows) * sum(matrices) + head
        for _ in range(workload.num_prompts):
            flops += 2 * head
            for window in config.layer_windows:
                seen = len(visible(workload.input_len + output - 1, window))
                flops += sum(2 * m for m in matrices) + 4 * config.num_heads * dim * seen
                moved += token_kv * (seen + 1)
    return flops, moved * size


@given(workloads, st.integers(1, 40), st.booleans())
def test_costs_equal_counting_one_by_one(workload: Workload, budget: int, gated: bool) -> None:
    config = ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=31,
        hidden_size=12,
        intermediate_size=20,
        num_layers=3,
        num_heads=6,
        num_kv_heads=2,
        head_dim=5,
        max_position_embeddings=64,
        gated_mlp=gated,
        layer_windows=(None, 4, 4),
    )
    cost = ModelCost.from_config(config, "bfloat16")
    work = cost.workload(workload, max_num_batched_tokens=budget)
    assert (work.flops, work.bytes) == brute_force(config, workload, budget, size=2)


def test_costs_of_experts() -> None:
    """One token reads what it computes with; so many that every expert is taken read all there is."""
    moe = MoEConfig(8, 2, 10, (1, 2), True, 6)
    config = ModelConfig("", 31, 12, 20, 3, 6, 2, 5, 64, layer_windows=(None,) * 3, moe=moe)
    cost = ModelCost.from_config(config, "float32")
    attention, mlp, router = 12 * 5 * (6 + 2 + 2 + 6), 3 * 12 * 20, 12 * (8 + 1)
    outside = 3 * attention + mlp + 2 * (router + 3 * 12 * 6)
    assert cost.layer_parameters == cost.layer_parameters_read(1) == outside + 2 * 2 * 3 * 12 * 10
    every = outside + 2 * 8 * 3 * 12 * 10
    assert cost.num_parameters == every + 2 * 31 * 12
    assert cost.layer_parameters_read(10**6) == pytest.approx(every)


def test_costs_of_latent_attention() -> None:
    """What is cached and computed follows from the latent, in benchmarks and in the simulator alike."""
    config = translate_config(shapes.SHAPES["deepseek-v3"])
    cost, figures = ModelCost.from_config(config, "bfloat16"), figures_of(config, "bfloat16")
    assert figures.kv_bytes_per_token == 61 * 576 * 2
    assert figures.pair_flops == 61 * 2 * 128 * (576 + 512)
    alone, with_context = cost.step(1, 0, 61, 0), cost.step(1, 0, 61 * 10, 61 * 9)
    assert with_context.flops - alone.flops == 9 * figures.pair_flops
    assert with_context.bytes - alone.bytes == 9 * figures.kv_bytes_per_token


TINY = {
    **shapes.SHAPES["qwen3-0.6b"],
    "vocab_size": 331,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setitem(shapes.SHAPES, "tiny", TINY)
    yield "tiny"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_checkpoints_are_sharded_and_complete(
    tiny: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "_SHARD_BYTES", 50_000)
    checkpoint.write_checkpoint(tiny, tmp_path, dtype=dtype)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    expected = dict(checkpoint.tensor_shapes(TINY))
    assert index["weight_map"].keys() == expected.keys()
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 1 and {f.name for f in files} == set(index["weight_map"].values())
    total = 0
    for file in files:
        with safe_open(file, "numpy") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (a safetensors handle is no mapping)
                assert tuple(tensors.get_slice(name).get_shape()) == expected[name]
                total += int(np.prod(expected[name])) * (4 if dtype == "float32" else 2)
    assert total == index["metadata"]["total_size"]
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == dtype


def test_the_machine_is_measured() -> None:
    measured = machine.measure()
    assert 1e8 < measured.read_bandwidth < 1e14
    assert 1e8 < measured.copy_bandwidth < 1e14
    assert 1e9 < measured.flops("float32") < 1e16
    assert measured.flops("float16") == measured.flops("float32")


def test_a_peer_that_cannot_start_says_why(tmp_path: Path) -> None:
    missing = tmp_path / "no-such-model"
    with (
        peers.Peer("jaxllm", sys.executable, tmp_path / "log") as peer,
        pytest.raises(peers.PeerError, match="no-such-model"),
    ):
        peer.load(model=str(missing), dtype="float32", max_model_len=32, max_num_seqs=2)


def test_comparing_with_oneself(tiny: str, tmp_path: Path) -> None:
    directory = checkpoint.write_checkpoint(tiny, tmp_path / "model")
    rows = [Workload(2, 5, 3), Workload(3, 40, 1, shared_len=32)]
    with (
        peers.Peer("jaxllm", sys.executable, tmp_path / "a") as ours,
        peers.Peer("jaxllm", sys.executable, tmp_path / "b") as theirs,
    ):
        result = compare.compare(
            [ours, theirs], directory, tiny, "float32", rows, repeats=2, seed=0, max_num_batched_tokens=32
        )
    assert result.engines[0].startswith("jaxllm ")
    assert [[len(m.seconds) for m in row] for row in result.runs] == [[2, 2], [2, 2]]
    assert all(seconds > 0 for row in result.runs for m in row for seconds in m.seconds)
    assert result.geometric_mean(result.ratio) == pytest.approx((result.ratio(0) * result.ratio(1)) ** 0.5)
    # Nothing runs faster than the machine can: a tiny model is far from it.
    assert all(result.bound(row) > result.ratio(row) for row in range(2))
    compare.print_comparison(result)


def test_a_start_is_timed_to_its_first_token(tiny: str, tmp_path: Path) -> None:
    directory = checkpoint.write_checkpoint(tiny, tmp_path / "model")
    arguments: dict[str, object] = {"model": str(directory), "max_num_seqs": 2, "max_model_len": 32}
    arguments["max_num_batched_tokens"] = 32
    start = startup.start_once(arguments | {"compilation_cache_dir": str(tmp_path / "cache")}, 4, "cold")
    assert [name for name, _ in start.stages] == list(startup.STAGES)
    assert all(seconds > 0 for _, seconds in start.stages)
    assert all(0 < seconds < start.seconds for _, seconds in start.log)
    with pytest.raises(RuntimeError, match="did not start"):
        startup.start_once({"model": str(tmp_path / "nothing")}, 4, "cold")


def test_steps_are_recorded_and_what_is_fitted_is_served(
    tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--shape", tiny, "--max-model-len", "64", "--max-num-seqs", "4"]
    common += ["--max-num-batched-tokens", "32"]
    out, steps = tmp_path / "cost.json", tmp_path / "steps.json"
    with every_shape():
        profile_steps.main([*common, "--repeats", "1", "--out", str(out), "--json", str(steps)])
    cost = FittedCost.load(out)
    # Every shape that such an engine compiles was run.
    compiled = step_shapes(4, 32, 4)
    assert set(cost.shapes) == {Shape(s.num_tokens, s.num_seqs, s.decode_only) for s in compiled}
    recorded = json.loads(steps.read_text())
    assert min(seconds for *_, seconds in recorded) > 0
    for shape, seconds in cost.shapes.items():
        own = [step[-1] for step in recorded if step[0] == list(shape)]
        assert 0 <= seconds <= 3 * np.median(own)
    assert cost.tiles is not None

    rows = tmp_path / "rows.json"
    fidelity.main([*common, "--num-requests", "6", "--scale", "0.02", "--json", str(rows)])
    compared = json.loads(rows.read_text())
    assert len(compared) == 5
    for row in compared:
        assert row["num_requests"] == 6
        assert all(value > 0 for side in ("engine", "simulated") for value in row[side].values())


@pytest.mark.parity
def test_transformers_is_a_peer(tiny: str, tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="parity tests need torch: pip install -e '.[test,parity]'")
    directory = checkpoint.write_checkpoint(tiny, tmp_path / "model")
    with peers.Peer("transformers", sys.executable, tmp_path / "log") as peer:
        engine, _ = peer.load(model=str(directory), dtype="float32", max_model_len=64, max_num_seqs=4)
        assert engine.startswith("transformers ")
        assert peer.generate([[5, 6, 7], [8, 9, 10]], 4) > 0


def test_standard_rows_are_those_releases_are_compared_by() -> None:
    assert [str(row) for row in STANDARD] == [
        "1 x 16 -> 64",
        "1 x 1024 -> 1",
        "8 x 128 -> 64",
        "32 x 128 -> 64",
        "64 x 64 -> 64",
        "16 x 512 -> 32",
        "16 x 512 -> 32 (448 shared)",
    ]


@pytest.fixture
def small_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names of the attention benchmarks, with sizes that take no time."""
    every = tune.candidates
    ceilings = machine.Machine("cpu", "cpu", 1, 2, "3", "0", 1e9, 1e9, {"float32": 1e9})
    monkeypatch.setattr(kernels, "measure", lambda: ceilings)
    monkeypatch.setattr(
        tune, "candidates", lambda *a, decode_only: itertools.islice(every(*a, decode_only=decode_only), 3)
    )
    monkeypatch.setitem(LAYERS, "small", LayerShape(4, 2, 8))
    monkeypatch.setitem(
        LAYERS, "small, odd", LayerShape(4, 2, 8, window=5, sinks=True, alibi=True, spans=True)
    )
    monkeypatch.setitem(LAYERS, "latent", LatentShape(4, 16, 8))
    monkeypatch.setitem(WORKS, "decode", Work(((20, 1),) * 3))
    monkeypatch.setitem(WORKS, "prefill", Work(((0, 33),) * 2))
    monkeypatch.setitem(WORKS, "endless", Work(((2**40, 1),)))
    monkeypatch.setitem(WORKS, "mixed", Work(((7, 1), (16, 9))))


def test_attention_is_timed(small_shapes: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, picture = tmp_path / "kernels.json", tmp_path / "roofline.png"
    names = ["--layer", "small", "small, odd", "latent", "--work", "decode", "mixed", "endless"]
    kernels.main([*names, "--budget", "0.001", "--json", str(out), "--plot", str(picture)])
    timings = json.loads(out.read_text())["timings"]
    done = [(t["layer"], t["work"], t["implementation"]) for t in timings]
    every = itertools.product(("small", "small, odd", "latent"), ("decode", "mixed"))
    here = {layer: attention.backends_here(LAYERS[layer], np.dtype(np.float32)) for layer in LAYERS}
    assert done == [(layer, work, by) for layer, work in every for by in (here[layer][-1], "dense")]
    for timing in timings:
        peers = set() if timing["implementation"] == "dense" else {"dense"}
        assert timing["times_as_fast_as"].keys() == peers
        assert timing["seconds"] > 0
        assert timing["floor"] == max(timing["num_bytes"], timing["flops"]) / 1e9
    assert picture.stat().st_size > 1000
    said = capsys.readouterr().out
    assert "endless: left out, its cache of " in said
    slower = re.findall(r"(\w+) is slower than dense at \d of (\d) shapes", said)
    assert slower in ([("cpu", "4"), ("xla", "2")], [("xla", "6")])


@pytest.mark.parametrize("layer", ["small, odd", "latent"])
def test_peers_of_the_attention_benchmark_compute_what_the_op_does(small_shapes: None, layer: str) -> None:
    """Plain JAX on what was gathered, against the op on its pages: every option, lengths that differ."""
    for work in ("decode", "mixed"):
        setting = attention.Setting(LAYERS[layer], WORKS[work], np.dtype(np.float32), 16, 2, 0)
        setting.fill()
        operands = (*setting.new, setting.pages, 1, *map(jnp.asarray, setting.batch))
        out, setting.pages = setting.op(*operands, **setting.options, backend="reference")
        dense = [
            attention_peers.plain_attention(part.q, *part.layers[1], setting.options)
            for part in setting.dense()  # with the new tokens, which are in the pages by now
        ]
        # Sums of some dozens of products in another order.
        flat = np.concatenate([np.asarray(x).reshape(-1, *out.shape[1:]) for x in dense])
        np.testing.assert_allclose(flat, out, rtol=1e-4, atol=1e-5)


def test_turns_of_close_and_of_distant_rivals() -> None:
    """Two that are close have several turns, whatever they take; one that is far behind is not repeated."""
    now, calls = [0.0], []

    def take(budget: float, **seconds: float) -> dict[str, list[float]]:
        def passes(name: str) -> attention.Passes:
            def run(count: int) -> None:
                calls.append((name, count))
                now[0] += seconds[name] * count

            return run

        return kernels.take_turns({name: passes(name) for name in seconds}, budget, lambda: now[0])

    times = take(0.01, a=0.004, b=0.005)
    assert {name: len(own) for name, own in times.items()} == dict.fromkeys("ab", kernels.FEWEST_TURNS)
    np.testing.assert_allclose(times["b"], 0.005)
    assert kernels.compare(times["b"], times["a"]) == pytest.approx(1.25)
    calls.clear()
    times = take(0.02, a=0.0001, b=0.03)
    assert len(times["b"]) == 1 < len(times["a"]) and calls.count(("b", 1)) == 1
    # A turn of what is quick is of many passes.
    assert ("a", round(0.02 / kernels.FEWEST_TURNS / 0.0001)) in calls
    assert kernels.compare(times["b"], times["a"]) == pytest.approx(300)


def test_tiles_are_tuned(small_shapes: None, tmp_path: Path) -> None:
    out = tmp_path / "tuned.json"
    out.write_text(json.dumps({"xla": {"another": {"decode_block": 1}}}))
    quick = [
        "--repeats",
        "1",
        "--at-least",
        "0.0001",
        "--margin",
        "-9",
        "--out",
        str(out),
        "--backend",
        "xla",
    ]
    tune.main(
        ["--layer", "small", "--work", "decode", "mixed", *quick, "--json", str(tmp_path / "found.json")]
    )
    table = json.loads(out.read_text())["xla"]
    found = json.loads((tmp_path / "found.json").read_text())
    assert table["another"] == {"decode_block": 1}
    assert [choice["num_candidates"] for choice in found] == [3, 3]
    for choice in found:
        assert table.get(choice["shape"]) == choice["tiling"]


@pytest.mark.parametrize(
    ("seconds", "suite", "reached"), [(1e-3, 0, True), (1e-3, 1, False), (2e-3, 0, False), (None, 0, False)]
)
def test_the_acceptance_of_a_gpu(
    seconds: float | None, suite: int, reached: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Kernels at 90 % of the ceilings and a peer at 1.5 ms; or half as fast; or nothing measured."""
    if seconds is not None:
        (tmp_path / "kernels.json").write_text(
            json.dumps(
                {
                    "machine": {"copy_bandwidth": 4e12, "matmul_flops": {"bfloat16": 8e14}},
                    "timings": [
                        {"layer": "qwen3-8b", "work": work, "implementation": name, "seconds": each}
                        | {"num_bytes": 3.6e9, "flops": 7.2e11, "times_as_fast_as": {"torch": 1.5e-3 / each}}
                        for work in ("decode 64 x 8k", "prefill 8k")
                        for name, each in (("gpu", seconds), ("torch", 1.5e-3))
                    ],
                }
            )
        )
        rows = [
            {"workload": {"num_prompts": n}, "seconds": [1.0, 9.0, 0.5], "fastest_seconds": 0.8}
            for n in (1, 64)
        ]
        (tmp_path / "engine.json").write_text(json.dumps({"rows": rows}))
    (tmp_path / "status.txt").write_text(f"kernels 0\nengine 0\nsuite {suite}\n")
    with pytest.raises(SystemExit) as ended:
        gpu_acceptance.main([str(tmp_path)])
    assert (not ended.value.code) == reached
    table = capsys.readouterr().out
    assert ("NO" in table) != reached
    assert ("not measured" in table) == (seconds is None)


def test_structured_output_counts_every_form(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "costs.json"
    arguments = [
        "--tokenizer",
        str(demo_model_path()),
        "--sequences",
        "3",
        "--steps",
        "4",
        "--json",
        str(file),
    ]
    structured_output.main(arguments)
    costs = json.loads(file.read_text())
    assert [row["form"] for row in costs["rows"]] == [*structured_output.FORMS, "mix"]
    table = capsys.readouterr().out
    for row in costs["rows"]:
        assert row["form"] in table
        for name in ("fill_ms", "accept_ms", "cpu_ms"):
            assert len(row[name]) == 4 and min(row[name]) >= 0
    kinds = [(one["form"], one["masks_first"]) for one in costs["waiting"]]
    assert kinds == [
        ("no form", False),
        *((f, first) for f in ("schema", "regex") for first in (True, False)),
    ]
    assert all(len(one["idle_ms"]) == 4 and min(one["idle_ms"]) >= 0 for one in costs["waiting"])


def test_a_large_vocabulary_is_as_large_as_asked_and_spells_anything(tmp_path: Path) -> None:
    library = tmp_path / "module.py"
    library.write_text("def naïve_words(x):\n    return 'some words and more words'\n")
    tokenizer = vocabulary.large_tokenizer(290, [library])
    assert len(tokenizer) == 290 and tokenizer.eos_token_id is not None
    text = " words, naïve\n\tand ünseen 😀"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode(" words")) == 1
    with pytest.raises(ValueError, match="vocab_size must be at most"):
        vocabulary.large_tokenizer(5000, [library])
