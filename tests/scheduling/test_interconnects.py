"""What chips say to each other, against counting links and steps by hand."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest

from jaxllm.scheduling.simulator import DEVICES, INTERCONNECTS


def test_an_all_reduce_by_hand() -> None:
    size = 3e8
    v5e, h200 = INTERCONNECTS["v5e"], INTERCONNECTS["h200"]
    # Two chips share one of four links; a corner of a slice of 4 x 8 has two; a whole pod closes both axes.
    assert v5e.all_reduce_seconds(size, 2) == pytest.approx(size / 50e9 + 2e-6)
    assert v5e.all_reduce_seconds(size, 32) == pytest.approx(2 * 31 / 32 * size / 100e9 + 2 * (3 + 7) * 1e-6)
    assert v5e.all_reduce_seconds(size, 128) == pytest.approx(
        2 * 127 / 128 * size / 150e9 + 2 * (7 + 8) * 1e-6
    )
    assert v5e.all_reduce_seconds(size, 256) == pytest.approx(
        2 * 255 / 256 * size / 200e9 + 2 * (8 + 8) * 1e-6
    )
    assert h200.all_reduce_seconds(size, 8) == pytest.approx(2 * 7 / 8 * size / 450e9 + 8e-6)
    assert h200.all_reduce_seconds(size, 1) == 0
    for chips in (3, 16):
        with pytest.raises(ValueError, match=f"{chips} chips: a power of two up to 8"):
            h200.all_reduce_seconds(size, chips)


def test_an_all_to_all_by_hand() -> None:
    size = 3e8
    v5e, h200 = INTERCONNECTS["v5e"], INTERCONNECTS["h200"]
    # Half of it to the neighbour; of 4 x 8 chips half of a row of eight's over one link; a pod closes.
    assert v5e.all_to_all_seconds(size, 2) == pytest.approx(size / 2 / 50e9 + 1e-6)
    assert v5e.all_to_all_seconds(size, 32) == pytest.approx(8 / 2 * size / 2 / 50e9 + (3 + 7) * 1e-6)
    assert v5e.all_to_all_seconds(size, 256) == pytest.approx(16 / 2 * size / 2 / 100e9 + (8 + 8) * 1e-6)
    assert h200.all_to_all_seconds(size, 8) == pytest.approx(7 / 8 * size / 450e9 + 4e-6)
    assert h200.all_to_all_seconds(size, 64) == pytest.approx(7 / 8 * size / 50e9 + 10e-6)
    assert v5e.all_to_all_seconds(size, 1) == h200.all_to_all_seconds(size, 1) == 0
    with pytest.raises(ValueError, match="3 chips: a power of two"):
        h200.all_to_all_seconds(size, 3)


@pytest.mark.parametrize("sizes", [(4, 8), (2, 4), (16, 8)])
def test_an_all_to_all_fills_the_busiest_link(sizes: tuple[int, int]) -> None:
    """Every chip sends to every other one, first along its row; links of an axis of 16 close it."""
    rows, columns = sizes
    load: Counter[tuple[int, int, int, int]] = Counter()

    def walk(at: int, to: int, size: int) -> list[tuple[int, int]]:
        ways = [range(at, to), range(at, to, -1)][at > to : (at > to) + 1]
        hops = [(i, 1 if at < to else -1) for i in ways[0]]
        if size == 16 and abs(at - to) > 8:
            step = -1 if at < to else 1
            hops = [((at + k * step) % 16, step) for k in range(16 - abs(at - to))]
        elif size == 16 and abs(at - to) == 8:  # as well the one way round as the other
            step = 1 if (at // 2 + to) % 2 else -1
            hops = [((at + k * step) % 16, step) for k in range(8)]
        return hops

    for source, target in itertools.product(itertools.product(range(rows), range(columns)), repeat=2):
        for i, step in walk(source[1], target[1], columns):
            load[(0, source[0], i, step)] += 1
        for i, step in walk(source[0], target[0], rows):
            load[(1, target[1], i, step)] += 1
    chips = rows * columns
    busiest = max(load.values()) * 1e6 / chips / 50e9
    seconds = INTERCONNECTS["v5e"].all_to_all_seconds(1e6, chips)
    hops = sum(size // 2 if size == 16 else size - 1 for size in sizes)
    assert seconds - hops * 1e-6 == pytest.approx(busiest, rel=0.1)


def test_what_is_handed_on_crosses_a_link_or_the_network() -> None:
    v6e = INTERCONNECTS["v6e"]
    assert v6e.send_seconds(1e6, within=True) == pytest.approx(1e6 / 100e9 + 1e-6)
    assert v6e.send_seconds(1e6, within=False) == pytest.approx(1e6 / 12.5e9 + 20e-6)


def test_every_interconnect_is_of_a_device() -> None:
    assert INTERCONNECTS.keys() <= DEVICES.keys()
