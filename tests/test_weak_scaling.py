"""What the scaling benchmark promises of meshes, by hand and by what must hold of any."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.scaling import draw
from benchmarks.weak_scaling import Counts, fitting, points, takeover
from jaxllm.scheduling.simulator import DEVICES, INTERCONNECTS

H200, LINKS = DEVICES["h200"], INTERCONNECTS["h200"]
LAYERS, WEIGHTS = 80, 140e9


def counts_of(tensor: int) -> Counts:
    """A model like Llama-3.1-70B with two requests a chip."""
    tokens = 2 * tensor
    return Counts(
        "decode", tensor, tokens, LAYERS, 8192, 2,
        product_flops=round(2 * tokens * WEIGHTS / 2 / tensor),
        attention_flops=0,
        weight_bytes=round(WEIGHTS / tensor),
        read_bytes=round(WEIGHTS / tensor),
        kv_bytes=10**9,
        all_reduces=161 if tensor > 1 else 0,
        all_reduce_bytes=161 * tokens * 8192 * 2,
        other_bytes=0,
    )  # fmt: skip


COUNTS = [counts_of(2**i) for i in range(7)]


def test_a_step_by_hand() -> None:
    two = COUNTS[1]
    assert two.compute_seconds(H200) == pytest.approx((70e9 + 1e9) / (4800e9 * 0.8))
    each = 4 * 8192 * 2
    assert two.all_reduce_seconds(LINKS) == pytest.approx(161 * (each / 0.8 / 450e9 + 8e-6))
    # The largest of three stages has 27 of 80 layers.
    assert two.compute_seconds(H200, 3) == pytest.approx(two.compute_seconds(H200) * 27 / 80)
    assert COUNTS[0].all_reduce_seconds(LINKS) == 0


def test_what_fits() -> None:
    assert fitting(COUNTS, H200, LINKS) == [(1, 2), (1, 4), (1, 8)]  # as many as a switch joins
    copied = [replace(one, kv_bytes=one.tensor * 10**10) for one in COUNTS]
    assert fitting(copied, DEVICES["v5p"], INTERCONNECTS["v5e"]) == [(1, 4)]
    with pytest.raises(ValueError, match="fits on no counted number of h200"):
        fitting([replace(one, kv_bytes=10**12) for one in COUNTS], H200, LINKS)


def test_meshes_up_to_256_chips(tmp_path: Path) -> None:
    found = list(points(COUNTS[1:4], H200, LINKS, 256))
    by_plan = {plan: [p for p in found if p.plan == plan] for plan in {p.plan for p in found}}
    assert [p.tensor for p in by_plan["tensor"]] == [2, 4, 8]
    assert [p.chips for p in by_plan["tensor x data"]] == [2, 4, 8, 16, 32, 64, 128, 256]
    assert max(p.pipe for p in by_plan["tensor x pipe"]) == 64  # no stage without a layer
    # Replicas say nothing to each other.
    assert len({p.tokens_per_chip for p in by_plan["tensor x data"]}) == 1
    for point in found:
        assert point.tokens_per_chip == pytest.approx(
            point.data * 2 * point.tensor / point.seconds / point.chips
        )
        assert (point.hand_on > 0) == (point.pipe > 1)
    draw(found, "", tmp_path / "out.png")
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def test_replicas_that_share_experts_by_hand() -> None:
    """Eight replicas of two chips: their rows go to another switch, but for one in two."""
    one = replace(COUNTS[1], data=8, expert_flops=10**14, all_to_alls=3 * 80, all_to_all_bytes=240 * 10**6)
    assert one.compute_seconds(H200) == pytest.approx((one.product_flops + 10**14) / (989e12 * 0.6))
    each = 10**6 / 0.8
    assert one.all_to_all_seconds(LINKS) == pytest.approx(240 * (each / 2 / 50e9 + 10e-6))
    found = list(points([*COUNTS[1:3], one], H200, LINKS, 16))
    [shared] = [point for point in found if point.plan == "experts over data x tensor"]
    assert (shared.data, shared.tensor, shared.chips) == (8, 2, 16)
    assert shared.seconds == pytest.approx(
        one.compute_seconds(H200) + one.all_reduce_seconds(LINKS) + one.all_to_all_seconds(LINKS)
    )
    assert shared.tokens_per_chip == pytest.approx(8 * one.num_tokens / shared.seconds / 16)
    # A model that only shared experts can hold has no other plan.
    assert {point.plan for point in points([one], H200, LINKS, 16)} == {shared.plan}


def test_where_summing_takes_over() -> None:
    v5e, links = DEVICES["v5e"], INTERCONNECTS["v5e"]
    prefills = [
        replace(one, kind="prefill", num_tokens=256 * one.tensor, all_reduce_bytes=128 * one.all_reduce_bytes)
        for one in COUNTS
    ]
    found = list(points(prefills[3:], v5e, links, 256))
    at = takeover(found)
    assert at is not None
    for point in found:
        if point.plan == "tensor":
            assert (point.all_reduce > point.compute) == (point.tensor >= at)
    assert takeover([p for p in found if p.plan != "tensor"]) is None
