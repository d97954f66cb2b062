"""What accelerators can do at best, from their makers' data sheets."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Device:
    """One chip.

    Attributes:
        flops: dense bfloat16 floating-point operations a second.
        bandwidth: bytes of memory a second.
        memory: bytes.
        host_bandwidth: bytes a second to the host's memory or from it: PCIe 4.0 or 5.0 with 16 lanes; the
            makers of TPUs give none, and PCIe 3.0 is taken for them.
    """

    name: str
    flops: float
    bandwidth: float
    memory: float
    host_bandwidth: float


DEVICES = {
    device.name: device
    for device in (
        Device("v5e", 197e12, 819e9, 16e9, 16e9),
        Device("v5p", 459e12, 2765e9, 95e9, 16e9),
        Device("v6e", 918e12, 1640e9, 32e9, 16e9),
        Device("a100", 312e12, 2039e9, 80e9, 32e9),
        Device("h100", 989e12, 3350e9, 80e9, 64e9),
        Device("h200", 989e12, 4800e9, 141e9, 64e9),
    )
}
