"""Times steps of the engine in every compiled shape, and fits the simulator's cost model to them.

    python -m benchmarks.profile_steps --shape llama-135m --out cost.json
    python -m jaxllm.simulate --cost cost.json --num-gpu-blocks 4000 --model MODEL ...

The time of a step is that from the end of the one before it, or from its own launch where that comes
later: what the host does meanwhile is hidden, as it is when the engine serves.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable, Iterator
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from tqdm import tqdm

from benchmarks.engine import add_model_arguments, model_arguments, model_name, wait_until_compiled
from benchmarks.report import add_output_arguments, figure, print_table, save, write_json
from jaxllm.scheduling.simulator import FittedCost, RecordedStep, Shape, Tiles

if TYPE_CHECKING:
    from jaxllm import LLM
    from jaxllm.execution.pending import Pending
    from jaxllm.request import Request
    from jaxllm.scheduling import Plan, StepResult

_numbers = count()


class StepRecorder:
    """Notes the plan, the shape and the time of every step of an engine, until it is closed."""

    def __init__(self, llm: LLM) -> None:
        self.steps: list[RecordedStep] = []
        self._runner = runner = llm.llm_engine.runner
        self._last_end = 0.0
        self._execute = runner.execute
        runner.execute = self._timed  # type: ignore[method-assign]

    def close(self) -> None:
        self._runner.execute = self._execute  # type: ignore[method-assign]

    def _timed(self, plan: Plan) -> Pending:
        launched = time.perf_counter()
        pending = self._execute(plan)
        num_tokens, num_seqs, _, decode_only = pending.shape
        shape, wait = Shape(num_tokens, num_seqs, decode_only), pending.result

        def result() -> StepResult:
            answer = wait()
            end = time.perf_counter()
            self.steps.append(RecordedStep.of(plan, shape, end - max(launched, self._last_end)))
            self._last_end = end
            return answer

        pending.result = result  # type: ignore[method-assign]
        return pending


def tiles_of(llm: LLM) -> Tiles | None:
    """How the engine's attention cuts its work; None for kernels that no figures are kept of."""
    from pallas_kernels.ragged_paged_attention import xla_flash

    decoder = llm.llm_engine.runner._decoder
    backend = decoder.form.attention_backend
    if backend == "cpu":
        from pallas_kernels.native.tiles import WIDTH
        from pallas_kernels.ragged_paged_attention.cpu_prefill import ROWS

        # Decodes read the keys that there are; a vector of queries goes as far as its last one, in rows.
        tile = (WIDTH, ROWS)
        return Tiles(1, 1, 1, tile, tile, 0)
    if backend != "xla":
        return None
    shards = 1 if decoder.form.mesh is None else decoder.form.mesh.shape["tensor"]
    # Latents are keys and values at once: a row counts as half of either.
    rows, width = decoder.fitted.cache_rows
    tiling = xla_flash.Tiling.choose(1, -(-rows // shards * width // 2))
    page = llm.llm_engine.config.block_size
    (short, short_keys), (long, long_keys) = tiling.short_tiles, tiling.long_tiles
    keys, lanes = max(tiling.decode_block, page), tiling.decode_lanes
    return Tiles(
        keys,
        *lanes,
        (short, max(short_keys, page)),
        (long, max(long_keys, page)),
        xla_flash.SHORT_PREFILL,
    )


class Workload(NamedTuple):
    """What is given to the engine so that a shape runs.

    Attributes:
        decodes: requests that have their prompt behind them when the others arrive.
        context: tokens of their prompts.
        prompts: tokens of each request that arrives then.
        output_len: tokens that each of the latter generates.
    """

    decodes: int
    context: int
    prompts: tuple[int, ...]
    output_len: int


def workloads(shapes: list[Shape], max_model_len: int, generator: np.random.Generator) -> Iterator[Workload]:
    """Some that use every shape, more or less full: alone and beside others, at short and long contexts."""
    mixed = sorted(shape.num_tokens for shape in shapes if not shape.decode_only)
    for shape in shapes:
        if shape.decode_only:
            for context in (16, max_model_len // 2):
                prompts = (context,) * shape.num_seqs
                yield Workload(0, 0, prompts, min(12, max_model_len - context))
            continue
        # More tokens than the next smaller shape would hold.
        least = max((size for size in mixed if size < shape.num_tokens), default=1) + 1
        for beside in (False, False, True, True, True):
            decodes = _few(1, shape.num_seqs // 2, generator) if beside and shape.num_seqs > 1 else 0
            total = int(generator.integers(least, shape.num_tokens + 1)) - decodes
            most = min(16, shape.num_seqs - decodes, total // 2)
            fewest = -(-total // (max_model_len - 1))
            if total < 2 or fewest > most:
                continue
            lengths = _split(total, _few(fewest, most, generator), max_model_len - 1, generator)
            context = int(generator.integers(16, max_model_len // 2 + 1)) if decodes else 0
            yield Workload(decodes, context, lengths, 1)


def _few(fewest: int, most: int, generator: np.random.Generator) -> int:
    """A number in between, twice as often as one that is twice as large: traffic is mostly of small ones."""
    return min(most, int(fewest * ((most + 1) / fewest) ** generator.random()))


def _split(total: int, parts: int, most: int, generator: np.random.Generator) -> tuple[int, ...]:
    """Lengths from 2 up to `most` that add up to `total`."""
    lengths, left = [2] * parts, total - 2 * parts
    for index, share in enumerate(generator.dirichlet(np.ones(parts)) * left):
        lengths[index] = min(most, lengths[index] + int(share))
    for index in generator.permutation(parts):
        lengths[index] += min(total - sum(lengths), most - lengths[index])
    return tuple(lengths)


def run_workload(llm: LLM, workload: Workload, generator: np.random.Generator) -> None:
    """Serves it to its end."""
    from jaxllm import SamplingParams, TokensPrompt

    engine = llm.llm_engine

    def submit(prompts: Iterable[np.ndarray], output_len: int) -> list[Request]:
        params = SamplingParams(temperature=0.0, max_tokens=output_len, ignore_eos=True)
        requests = []
        for token_ids in prompts:
            prompt = token_ids.tolist()
            processed = engine.input_processor.process(
                f"profiled-{next(_numbers)}", TokensPrompt(prompt_token_ids=prompt), params
            )
            engine.submit(processed.requests, processed.prompt)
            requests += processed.requests
        return requests

    longest, vocabulary = engine.input_processor.max_model_len, engine.model_config.vocab_size
    # The same prompts each time: their pages are still in the prefix cache.
    running = submit(
        (
            np.random.default_rng(index).integers(0, vocabulary, longest)[: workload.context]
            for index in range(workload.decodes)
        ),
        longest - workload.context,
    )
    while any(request.num_output_tokens < 2 for request in running):
        engine.step()
    waited_for = submit(
        (generator.integers(0, vocabulary, length) for length in workload.prompts), workload.output_len
    )
    while not all(request.status.is_finished for request in waited_for):
        engine.step()
    engine.abort([request.request_id for request in running])
    while engine.has_unfinished_requests():
        engine.step()


def record(llm: LLM, repeats: int, generator: np.random.Generator) -> list[RecordedStep]:
    """Steps of every shape that is compiled, more or less full, anew each time."""
    engine = llm.llm_engine
    compiled = [Shape(s.num_tokens, s.num_seqs, s.decode_only) for s in engine.runner.compiler.shapes]
    max_model_len = engine.input_processor.max_model_len
    given = [one for _ in range(repeats) for one in workloads(compiled, max_model_len, generator)]
    recorder = StepRecorder(llm)
    for workload in tqdm(given, desc="Recording", unit="workload"):
        run_workload(llm, workload, generator)
    recorder.close()
    return recorder.steps


def fit(llm: LLM, repeats: int, seed: int) -> tuple[FittedCost, list[RecordedStep]]:
    """The cost model of an engine, and the steps that it comes from; what runs first does not count."""
    wait_until_compiled(llm)
    generator = np.random.default_rng(seed)
    record(llm, 1, generator)
    steps = record(llm, repeats, generator)
    return FittedCost.fit(steps, tiles_of(llm)), steps


def print_fit(cost: FittedCost, steps: list[RecordedStep], title: str) -> None:
    """Each shape's price, and how far the recorded steps are from the fit."""
    rows: list[list[object]] = []
    for shape, seconds in sorted(cost.shapes.items()):
        own = [step for step in steps if step.shape == shape]
        errors = [abs(cost.price(step) / step.seconds - 1) for step in own]
        kind = "decode" if shape.decode_only else "mixed"
        rows.append(
            [
                f"{kind}, {shape.num_tokens} tokens",
                len(own),
                f"{seconds * 1e3:.2f}",
                f"{np.median(errors):.1%}",
            ]
        )
    note = ", ".join(
        f"{seconds * 1e6:.3g} µs {name}" for name, seconds in cost.prices._asdict().items() if seconds
    )
    print_table(title, ["shape", "steps", "ms", "median error"], rows, note=note)


def draw(cost: FittedCost, steps: list[RecordedStep], path: Path) -> None:
    """Recorded against fitted: points on the diagonal are steps that the model knows."""
    picture, axes = figure(width=6, height=6)
    for decode_only, label in ((True, "decode"), (False, "mixed")):
        own = [step for step in steps if step.shape.decode_only == decode_only]
        axes.plot([s.seconds for s in own], [cost.price(s) for s in own], ".", label=label, alpha=0.5)
    ends = [min(s.seconds for s in steps), max(s.seconds for s in steps)]
    axes.plot(ends, ends, color="black", linewidth=1)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("recorded, s")
    axes.set_ylabel("fitted, s")
    axes.legend()
    save(picture, path)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.profile_steps", description=__doc__.split("\n")[0]
    )
    add_model_arguments(parser)
    parser.add_argument("--max-model-len", type=int, default=1024)
    parser.add_argument("--max-num-seqs", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="write the cost model here, for `jaxllm.simulate --cost`")
    add_output_arguments(parser)
    options = parser.parse_args(arguments)
    from jaxllm import LLM

    limits = {"max_model_len": options.max_model_len, "max_num_seqs": options.max_num_seqs}
    with model_arguments(options) as engine_arguments, LLM(**engine_arguments | limits) as llm:
        cost, steps = fit(llm, options.repeats, options.seed)
    print_fit(cost, steps, model_name(options))
    if options.out is not None:
        cost.save(options.out)
    write_json(options.json, steps)
    if options.plot:
        draw(cost, steps, options.plot)


if __name__ == "__main__":
    main()
