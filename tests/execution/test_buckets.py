"""Shapes that steps are compiled for: every plan fits one, and gets the cheapest that is ready."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from jaxllm.execution.batch import LateShape, StepShape
from jaxllm.execution.buckets import choose, num_covering, step_shapes, with_late_shapes

LIMITS = st.tuples(st.integers(1, 300), st.integers(1, 5000)).map(lambda t: (min(t), max(t)))


@given(LIMITS, st.data())
def test_every_plan_fits_the_covering_shapes(limits: tuple[int, int], data: st.DataObject) -> None:
    max_num_seqs, max_tokens = limits
    shapes = step_shapes(max_num_seqs, max_tokens, 7)
    num_tokens = data.draw(st.integers(1, max_tokens))
    num_seqs = data.draw(st.integers(1, min(num_tokens, max_num_seqs)))
    decode_only = num_tokens == num_seqs and data.draw(st.booleans())
    for ready in (shapes[: num_covering(shapes)], shapes):
        shape = choose(ready, num_tokens, num_seqs, decode_only)
        assert shape is not None
        assert shape.num_tokens >= num_tokens and shape.num_seqs >= num_seqs and shape.pages_per_seq == 7
        assert decode_only or not shape.decode_only


@given(LIMITS, st.data())
def test_what_samples_late_is_there_where_it_is_needed(limits: tuple[int, int], data: st.DataObject) -> None:
    max_num_seqs, max_tokens = limits
    shapes = step_shapes(max_num_seqs, max_tokens, 7)
    programs, num_first = with_late_shapes(shapes)
    assert len(set(programs)) == len(programs)
    assert [one for one in programs if isinstance(one, StepShape)] == shapes
    assert {one for one in programs if isinstance(one, LateShape)} == {LateShape(s.num_seqs) for s in shapes}
    assert num_first == num_covering(shapes) + 1
    num_tokens = data.draw(st.integers(1, max_tokens))
    num_seqs = data.draw(st.integers(1, min(num_tokens, max_num_seqs)))
    decode_only = num_tokens == num_seqs and data.draw(st.booleans())
    plan = num_tokens, num_seqs, decode_only
    ready = programs[: data.draw(st.integers(num_first, len(programs)))]
    late = choose(ready, *plan, late=True)
    assert late is not None and LateShape(late.num_seqs) in ready
    assert choose(programs, *plan, late=True) == choose(programs, *plan) == choose(shapes, *plan)
    assert choose(shapes, *plan, late=True) is None


@given(LIMITS, st.data())
def test_no_shape_that_fits_is_cheaper(limits: tuple[int, int], data: st.DataObject) -> None:
    max_num_seqs, max_tokens = limits
    shapes = step_shapes(max_num_seqs, max_tokens, 1)
    num_tokens = data.draw(st.integers(1, max_tokens))
    num_seqs = data.draw(st.integers(1, min(num_tokens, max_num_seqs)))
    chosen = choose(shapes, num_tokens, num_seqs, num_tokens == num_seqs)
    assert chosen is not None
    for shape in shapes:
        fits = shape.num_tokens >= num_tokens and shape.num_seqs >= num_seqs
        if fits and (num_tokens == num_seqs or not shape.decode_only):
            assert shape.num_tokens >= chosen.num_tokens
            if shape.num_tokens == chosen.num_tokens:
                assert chosen.decode_only or not shape.decode_only


@given(LIMITS)
def test_shapes_are_few_distinct_and_within_the_limits(limits: tuple[int, int]) -> None:
    max_num_seqs, max_tokens = limits
    shapes = step_shapes(max_num_seqs, max_tokens, 3)
    assert len(set(shapes)) == len(shapes) <= 40
    assert all(s.num_tokens <= max_tokens and s.num_seqs <= max_num_seqs for s in shapes)
    assert all(s.num_tokens == s.num_seqs for s in shapes if s.decode_only)
    assert 1 <= num_covering(shapes) <= 4


def test_padding_wastes_less_than_half_of_a_step() -> None:
    shapes = step_shapes(64, 2048, 1)
    for num_tokens in range(17, 2049):
        shape = choose(shapes, num_tokens, 2, False)
        assert shape is not None and shape.num_tokens < 2 * num_tokens


def test_what_fits_nothing_gets_nothing() -> None:
    shapes = step_shapes(4, 16, 1)
    assert choose(shapes, 17, 1, False) is None
    assert choose(shapes, 5, 5, True) is None
    assert choose([], 1, 1, True) is None
    decode = StepShape(4, 4, 1, True)
    assert choose([decode], 4, 4, False) is None and choose([decode], 4, 4, True) == decode
