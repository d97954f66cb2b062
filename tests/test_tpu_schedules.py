"""Cycles are counted from a schedule as libtpu writes it."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.tpu_schedules import Schedule, cycles_of_a_block, draw, read_bundles

# A loop that is done before, then the one over blocks: with a loop that starts copies, one that lays rows
# apart, a stretch of products, and after a branch the end of a tile.
BUNDLES = """= control target key start
LB: loop body
= control target key end

     0   :  { %s1 = smov 0 } /* Start region 1 */
   0x1 LB: > { %p1 = scmp.ge.s32 %s1, 8 }
   0x2 LB: > { %s2 = sld [smem:[#allocation1]] }
   0x3 LB: >> { %s3 = sld [smem:[#allocation2]] }
   0x4   : >> { %4 = dma.hbm_to_vmem /*hbm=*/%s3, /*
base_bounds: (1) */ }
   0x5   : > { %s5 = sadd.s32 1, %s2 }
   0x6 LB: >> { %v6 = vld [vmem:[#allocation3]] }
   0x7   : >> { %7 = vst [vmem:[#allocation4]] %v6 }
   0x8   : >> { %p8 = scmp.ge.s32 %s5, 8 }
   0x9   : > { %v9 = vmatmul.f32 %v6 }
   0xa   : > { %v10 = vpow2.f32 %v9 }
   0xb   :  {} /* End region 2 */
   0xc PF: > { %12 = dma.vmem_to_hbm %v10 }
   0xd   :  { %13 = vsyncpa [#allocation5], 1 }
"""
USED = {6: (0, 3, 0), 7: (0, 2, 1), 9: (2, 0, 0), 10: (0, 1, 1)}


def utilization(used: dict[int, tuple[int, int, int]] = USED) -> str:
    rows = [used.get(address, (0, 0, 0)) for address in range(14)]
    lines = [" ".join(map(str, row)) for row in rows]
    return "\n".join(
        ["== CAPACTIY:", "MXU, VALU, VSTORE:SPILL", "    2     4     2", "== UTILIZATION:", *lines]
    )


def test_loops_are_told_apart_and_counted_as_often_as_they_turn() -> None:
    bundles = read_bundles(BUNDLES, utilization())
    assert [bundle.depth for bundle in bundles] == [0, 1, 1, 2, 2, 1, 2, 2, 2, 1, 1, 0, 1, 0]
    # Two bundles a page, three a strip, two of products; before, between and after them three more.
    assert cycles_of_a_block(bundles, pages=8, together=1, strips=4) == {
        "fetch": 16, "separate": 12, "products": 2, "control": 3, "spills": 1 + 4,
    }  # fmt: skip
    # Four pages to two bundles; and rows that are laid apart at once, in a stretch and not in a loop.
    bundles = read_bundles(BUNDLES, utilization(USED | {5: (0, 2, 0)}))
    assert cycles_of_a_block(bundles, pages=8, together=4, strips=1) == {
        "fetch": 4, "separate": 1, "products": 2, "control": 2, "spills": 1,
    }  # fmt: skip


def test_a_schedule_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="shorter"):
        read_bundles(BUNDLES, utilization().rsplit("\n", 1)[0])


def test_the_longer_of_copies_and_bundles_is_what_a_block_takes(tmp_path: Path) -> None:
    one = Schedule("v6e", "a layer", 512, 2**20, 100, 500, 400, 50, 800.0, 0, 1.0, 1.0)
    assert (one.compute, one.of_roofline) == (1000, 0.8)
    draw([one], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 5000
