"""What accelerators can do at best, from their makers' data sheets."""

from __future__ import annotations

import math
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


@dataclass(frozen=True, slots=True)
class Interconnect:
    """What joins chips, and what joins groups of so joined chips.

    Attributes:
        bandwidth: bytes a second that a chip sends over all its links, and receives as many.
        ports: links to neighbours in a two-dimensional torus, none where a switch joins all chips.
        domain: chips that are joined; an axis of the torus closes only where it spans the whole of it.
        hop_seconds: from one chip to the next, or through the switch.
        network_bandwidth: bytes a second from a chip to those of another domain.
        network_seconds: until the first of them is there.
    """

    bandwidth: float
    ports: int
    domain: int
    hop_seconds: float
    network_bandwidth: float
    network_seconds: float

    def all_reduce_seconds(self, num_bytes: float, chips: int) -> float:
        """An array of so many bytes summed over chips of a domain, each of which then has the sum.

        A reduce-scatter and an all-gather, of which each chip sends and receives `(chips - 1) / chips` of
        the array: at best, with every link that the chip with the fewest of them has (Thakur et al. 2005,
        section 4.5; Chan et al. 2007 for tori).

        Raises:
            ValueError: the chips are no power of two, or more than a domain has.
        """
        if chips < 1 or chips & (chips - 1) or chips > self.domain:
            raise ValueError(f"{chips} chips: a power of two up to {self.domain} are joined")
        share, hops = 1.0, 1
        if self.ports:
            axes, longest = _torus(chips), math.isqrt(self.domain)
            ends = sum(2 if size == longest else 1 for size in axes if size > 1)
            share = min(ends, self.ports) / self.ports
            hops = sum(size // 2 if size == longest else size - 1 for size in axes)
        if chips == 1:
            return 0.0
        sent = 2 * num_bytes * (chips - 1) / chips
        return sent / (self.bandwidth * share) + 2 * hops * self.hop_seconds

    def all_to_all_seconds(self, num_bytes: float, chips: int) -> float:
        """So many bytes of each chip, in equal parts for all chips of which it is one.

        Half of what all have crosses the middle of a torus, over the links that are there: of a row as long
        as the torus two, since it closes, else one. Through a switch everything goes at once. What goes to
        other domains goes over the network meanwhile.

        Raises:
            ValueError: the chips are no power of two.
        """
        if chips < 1 or chips & (chips - 1):
            raise ValueError(f"{chips} chips: a power of two is counted")
        within = min(chips, self.domain)
        own = num_bytes * within / chips
        seconds = own * (within - 1) / within / self.bandwidth + (within > 1) * self.hop_seconds
        if self.ports:
            longest, link = math.isqrt(self.domain), self.bandwidth / self.ports
            axes = [size for size in _torus(within) if size > 1]
            crossing = [size / (8 if size == longest else 4) for size in axes]
            hops = sum(size // 2 if size == longest else size - 1 for size in axes)
            seconds = max(crossing, default=0.0) * own / link + hops * self.hop_seconds
        if chips > self.domain:
            beyond = num_bytes * (1 - self.domain / chips) / self.network_bandwidth + self.network_seconds
            seconds = max(seconds, beyond)
        return seconds

    def send_seconds(self, num_bytes: float, *, within: bool) -> float:
        """An array from one chip to another, a neighbour in its domain or in another one."""
        if within:
            return num_bytes / (self.bandwidth / max(self.ports, 1)) + self.hop_seconds
        return num_bytes / self.network_bandwidth + self.network_seconds


def _torus(chips: int) -> tuple[int, int]:
    """The slice of so many chips that is nearest to a square."""
    rows = 1 << (chips.bit_length() - 1) // 2
    return rows, chips // rows


# Bandwidths: cloud.google.com/tpu/docs/v5e and v6e (400 and 800 GB/s both ways a chip, pods of 16 x 16; 6.4
# and 25.6 Tbit/s of data-centre network a pod), NVIDIA's data sheets of the H200 and of DGX systems (NVLink
# 900 GB/s both ways a GPU, eight to a switch, and 400 Gbit/s of InfiniBand each). Makers give no latencies: a
# microsecond a hop is what the book "How to Scale Your Model" (jax-ml.github.io/scaling-book) reckons with
# on TPUs; those of switch and network are assumed, of the order that small messages take.
INTERCONNECTS = {
    "v5e": Interconnect(200e9, 4, 256, 1e-6, 6.4e12 / 8 / 256, 20e-6),
    "v6e": Interconnect(400e9, 4, 256, 1e-6, 25.6e12 / 8 / 256, 20e-6),
    "h100": Interconnect(450e9, 0, 8, 4e-6, 50e9, 10e-6),
    "h200": Interconnect(450e9, 0, 8, 4e-6, 50e9, 10e-6),
}
