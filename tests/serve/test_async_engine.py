from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxllm.async_engine import AsyncEngine
from jaxllm.errors import EngineDeadError, InvalidRequestError
from jaxllm.output_stream import merge_outputs
from jaxllm.outputs import CompletionOutput, Logprob, RequestOutput
from jaxllm.sampling_params import RequestOutputKind, SamplingParams
from tests.serve.fake_engine import REPLY, FakeEngine, texts, wait_until

DELTA, CUMULATIVE, FINAL = (
    RequestOutputKind.DELTA,
    RequestOutputKind.CUMULATIVE,
    RequestOutputKind.FINAL_ONLY,
)


@contextmanager
def running(**config: Any) -> Iterator[tuple[FakeEngine, AsyncEngine]]:
    fake = FakeEngine(**config)
    engine = AsyncEngine(fake)  # type: ignore[arg-type]
    try:
        yield fake, engine
    finally:
        fake.gate.set()
        engine.stop(timeout=10)


async def collect(outputs: AsyncIterator[RequestOutput]) -> list[RequestOutput]:
    return [output async for output in outputs]


def params(kind: RequestOutputKind = DELTA, **fields: Any) -> SamplingParams:
    return SamplingParams(output_kind=kind, **{"max_tokens": 64, **fields})


@pytest.mark.parametrize("kind", [DELTA, CUMULATIVE, FINAL])
def test_a_request_says_what_the_engine_said(kind: RequestOutputKind) -> None:
    with running() as (_, engine):
        outputs = asyncio.run(collect(engine.generate("Hello", params(kind), "a")))
    said = texts(outputs) if kind is DELTA else outputs[-1].outputs[0].text
    assert said == REPLY
    assert outputs[-1].finished
    assert [o.finished for o in outputs[:-1]] == [False] * (len(outputs) - 1)


def test_only_one_thread_touches_the_engine() -> None:
    async def main(engine: AsyncEngine) -> None:
        await asyncio.gather(*(collect(engine.generate("Hello", params(), f"r{i}")) for i in range(20)))
        assert await engine.call(lambda e: e.reset_prefix_cache())
        assert await engine.wait_until_idle()

    with running() as (fake, engine):
        asyncio.run(main(engine))
    assert fake.resets == 1
    # The constructor's thread only built it; stop() aborts from the engine's own thread too.
    assert len(fake.threads) == 1
    assert threading.get_ident() not in fake.threads


def test_many_requests_at_once_do_not_mix() -> None:
    async def main(engine: AsyncEngine) -> list[list[RequestOutput]]:
        return await asyncio.gather(
            *(collect(engine.generate(f"Prompt {i}", params(), f"r{i}")) for i in range(100))
        )

    with running() as (fake, engine):
        fake.reply = lambda request: f"This is the answer to {request.request_id}."
        results = asyncio.run(main(engine))
    assert [texts(outputs) for outputs in results] == [f"This is the answer to r{i}." for i in range(100)]


def test_a_slow_consumer_loses_nothing() -> None:
    async def main(fake: FakeEngine, engine: AsyncEngine) -> list[RequestOutput]:
        outputs = []
        async for output in engine.generate("Hello", params(logprobs=1), "a"):
            outputs.append(output)
            # The engine finishes meanwhile.
            await asyncio.sleep(0.05)
            time.sleep(0.05)
        return outputs

    with running() as (fake, engine):
        outputs = asyncio.run(main(fake, engine))
    assert texts(outputs) == REPLY
    assert len(outputs) < 5 < fake.num_steps
    ids = [t for o in outputs for t in o.outputs[0].token_ids]
    positions = [p for o in outputs for p in o.outputs[0].logprobs or ()]
    assert len(ids) == len(positions) == fake.submitted[0].num_output_tokens
    assert all(token in position for token, position in zip(ids, positions, strict=True))


def test_an_idle_engine_does_not_spin() -> None:
    with running() as (fake, engine):
        asyncio.run(collect(engine.generate("Hello", params(), "a")))
        steps = fake.num_steps
        before = time.process_time()
        time.sleep(0.3)
        assert fake.num_steps == steps
        assert time.process_time() - before < 0.1


def test_leaving_early_aborts() -> None:
    async def main(engine: AsyncEngine) -> None:
        stream = engine.generate("Hello", params(ignore_eos=True, max_tokens=None), "a")
        async for _ in stream:
            break
        await stream.aclose()  # type: ignore[attr-defined]

    with running() as (fake, engine):
        fake.step_time = 0.001
        asyncio.run(main(engine))
        wait_until(lambda: fake.aborted == ["a"])
        assert not fake.has_unfinished_requests()


def test_a_cancelled_consumer_aborts() -> None:
    async def main(engine: AsyncEngine, fake: FakeEngine) -> None:
        task = asyncio.create_task(collect(engine.generate("Hello", params(FINAL, ignore_eos=True), "a")))
        while not fake.submitted:
            await asyncio.sleep(0.005)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    with running() as (fake, engine):
        fake.step_time = 0.05
        asyncio.run(main(engine, fake))
        wait_until(lambda: fake.aborted == ["a"])


def test_abort_by_id_ends_the_stream_with_reason_abort() -> None:
    async def main(engine: AsyncEngine) -> list[RequestOutput]:
        stream = engine.generate("Hello", params(ignore_eos=True, max_tokens=None), "a")
        outputs = [await anext(stream)]
        engine.abort(["a", "unknown"])
        return outputs + await collect(stream)

    with running() as (fake, engine):
        fake.step_time = 0.005
        outputs = asyncio.run(main(engine))
    assert outputs[-1].finished
    assert outputs[-1].outputs[0].finish_reason == "abort"
    assert fake.aborted == ["a"]


def test_a_bad_request_never_reaches_the_engine() -> None:
    with running() as (fake, engine):
        with pytest.raises(InvalidRequestError, match="empty"):
            asyncio.run(collect(engine.generate("", params(), "a")))
        assert fake.submitted == []
        assert texts(asyncio.run(collect(engine.generate("Hello", params(), "a")))) == REPLY


def test_a_request_that_the_scheduler_refuses_ends_with_its_error() -> None:
    with running() as (fake, engine):
        fake.refuse_submit = InvalidRequestError("needs more pages than there are")
        with pytest.raises(InvalidRequestError, match="more pages"):
            asyncio.run(collect(engine.generate("Hello", params(), "a")))
        fake.refuse_submit = None
        assert texts(asyncio.run(collect(engine.generate("Hello", params(), "a")))) == REPLY


@pytest.mark.parametrize("where", ["step", "submit"])
def test_a_failing_engine_ends_everybody(where: str) -> None:
    async def main(fake: FakeEngine, engine: AsyncEngine) -> list[Any]:
        tasks = [asyncio.create_task(collect(engine.generate("Hello", params(), f"r{i}"))) for i in range(5)]
        if where == "step":
            while len(fake.submitted) < 5:
                await asyncio.sleep(0.005)
        fake.gate.set()
        results = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 10)
        assert engine.is_dead
        with pytest.raises(EngineDeadError, match="no more memory"):
            await collect(engine.generate("Hello", params(), "late"))
        with pytest.raises(EngineDeadError):
            await engine.call(lambda e: e.reset_prefix_cache())
        engine.abort(["r0"])
        assert await engine.shutdown(drain=True, timeout=1)
        return results

    with running() as (fake, engine):
        if where == "step":
            # Let them all in before the step that fails.
            fake.step_time = 0.05
            fake.reply = lambda request: REPLY * 4
            fake.fail = None

            def fail_later() -> None:
                wait_until(lambda: len(fake.submitted) == 5)
                fake.fail = MemoryError("no more memory")

            threading.Thread(target=fail_later).start()
        else:
            fake.refuse_submit = MemoryError("no more memory")
        results = asyncio.run(main(fake, engine))
        assert isinstance(engine.error, MemoryError)
        assert fake.is_shut_down
    # The submission that broke it is told why; everybody else that the engine is dead.
    expected = (EngineDeadError, MemoryError) if where == "submit" else EngineDeadError
    assert all(isinstance(result, expected) for result in results)


def test_draining_lets_requests_finish_and_refuses_new_ones() -> None:
    async def main(engine: AsyncEngine, fake: FakeEngine) -> list[RequestOutput]:
        task = asyncio.create_task(collect(engine.generate("Hello", params(), "a")))
        while not fake.submitted:
            await asyncio.sleep(0.005)
        stopping = asyncio.create_task(engine.shutdown(drain=True, timeout=10))
        await asyncio.sleep(0.01)
        with pytest.raises(EngineDeadError, match="shutting down"):
            await collect(engine.generate("Hello", params(), "b"))
        assert await stopping
        return await task

    with running() as (fake, engine):
        fake.step_time = 0.01
        outputs = asyncio.run(main(engine, fake))
    assert texts(outputs) == REPLY
    assert fake.aborted == []
    assert fake.is_shut_down


def test_what_outlasts_the_drain_is_aborted() -> None:
    async def main(engine: AsyncEngine, fake: FakeEngine) -> list[RequestOutput]:
        task = asyncio.create_task(
            collect(engine.generate("Hello", params(ignore_eos=True, max_tokens=None), "a"))
        )
        while not fake.submitted:
            await asyncio.sleep(0.005)
        assert not await engine.shutdown(drain=True, timeout=0.05)
        return await asyncio.wait_for(task, 5)

    with running() as (fake, engine):
        fake.step_time = 0.02
        outputs = asyncio.run(main(engine, fake))
    assert outputs[-1].outputs[0].finish_reason == "abort"
    assert fake.aborted == ["a"]


def test_consumers_on_two_event_loops() -> None:
    with running() as (fake, engine):
        fake.step_time = 0.001
        said: dict[str, str] = {}

        def consume(name: str) -> None:
            said[name] = texts(asyncio.run(collect(engine.generate("Hello", params(), name))))

        threads = [threading.Thread(target=consume, args=(f"t{i}",)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
    assert said == {f"t{i}": REPLY for i in range(4)}


def test_an_event_loop_that_closes_takes_its_requests_with_it() -> None:
    async def leave(engine: AsyncEngine) -> None:
        request = params(ignore_eos=True, max_tokens=None)
        processed = await engine.process("a", "Hello", request)
        stream = engine.submit("a", processed, DELTA)
        await anext(stream)

    with running() as (fake, engine):
        fake.step_time = 0.005
        asyncio.run(leave(engine))
        wait_until(lambda: "a" in fake.aborted)
        assert texts(asyncio.run(collect(engine.generate("Hello", params(), "b")))) == REPLY


def _output(kind: RequestOutputKind, pieces: list[tuple[int, str, list[int]]]) -> RequestOutput:
    completions = [
        CompletionOutput(i, text, ids, logprobs=[{t: Logprob(-1.0)} for t in ids]) for i, text, ids in pieces
    ]
    return RequestOutput("r", "p", [1], None, completions, False)


@given(
    st.lists(
        st.lists(
            st.tuples(st.integers(0, 2), st.text(max_size=3), st.lists(st.integers(0, 9), max_size=3)),
            max_size=3,
            unique_by=lambda piece: piece[0],
        ),
        min_size=1,
        max_size=6,
    )
)
def test_merged_deltas_say_the_same(steps: list[list[tuple[int, str, list[int]]]]) -> None:
    merged = merge_outputs([_output(DELTA, pieces) for pieces in steps], DELTA)

    def spoken(index: int, part: int) -> list[Any]:
        return [piece[part] for step in steps for piece in step if piece[0] == index]

    assert {c.index for c in merged.outputs} == {p[0] for step in steps for p in step}
    for completion in merged.outputs:
        assert completion.text == "".join(spoken(completion.index, 1))
        assert completion.token_ids == [t for ids in spoken(completion.index, 2) for t in ids]
        assert [next(iter(p)) for p in completion.logprobs or ()] == completion.token_ids


def test_merged_cumulative_outputs_keep_the_last_of_each_completion() -> None:
    first = _output(CUMULATIVE, [(0, "a", [1]), (1, "x", [7])])
    second = _output(CUMULATIVE, [(0, "ab", [1, 2])])
    merged = merge_outputs([first, second], CUMULATIVE)
    assert {c.index: c.text for c in merged.outputs} == {0: "ab", 1: "x"}
