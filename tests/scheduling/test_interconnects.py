"""What chips say to each other, against counting links and steps by hand."""

from __future__ import annotations

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


def test_what_is_handed_on_crosses_a_link_or_the_network() -> None:
    v6e = INTERCONNECTS["v6e"]
    assert v6e.send_seconds(1e6, within=True) == pytest.approx(1e6 / 100e9 + 1e-6)
    assert v6e.send_seconds(1e6, within=False) == pytest.approx(1e6 / 12.5e9 + 20e-6)


def test_every_interconnect_is_of_a_device() -> None:
    assert INTERCONNECTS.keys() <= DEVICES.keys()
