"""What a step takes as chips are added and each keeps its share of requests, from counts of compiled steps.

The model, which is all that the figures rest on:

- Weak scaling: every chip brings `seqs_per_chip` requests (or so many prompt tokens), however many chips.
- Computing takes the longer of arithmetic and memory, each at a share of its ceiling (Williams et al. 2009).
  Products and weights of a device are those of the compiled step; attention, whose loops turn as often
  as the context asks, is counted: 4 FLOPs for each feature of each pair, and each key and value read once.
- Communication is added: nothing is computed meanwhile. The all-reduces and all-to-alls are those of the
  compiled step; a pipeline sends the hidden states on once a tick; replicas of the model say nothing to each
  other, unless they share the experts.
- Experts are chosen evenly: all get as many rows as the others, and an exchange takes one round (the sum of
  one number by which devices agree on that counts as one within a replica). Their products, too, are counted
  by hand; of their weights those are read that some token takes.
- A pipeline is full: every stage works in every tick, on a batch of its own (`jaxllm/execution/step.py`).
- `tensor` stays within a domain (a TPU slice, GPUs under one switch); `data` and `pipe` go beyond it, and so
  does what replicas exchange, over the network.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from jaxllm.scheduling.simulator.devices import Device, Interconnect

FLOPS_SHARE, BANDWIDTH_SHARE, LINK_SHARE = 0.6, 0.8, 0.8
MEMORY_SHARE = 0.92


@dataclass(frozen=True, slots=True)
class Counts:
    """One compiled step, on one of `data * tensor` devices.

    Attributes:
        kind: "decode" or "prefill".
        data: replicas that share the experts; 1 where they do not, and each device has a part of each expert.
        num_tokens: of the step, of each replica.
        num_layers, hidden_size: of the model.
        product_flops: of the products in the module; expert_flops: of those of experts, counted by hand.
        attention_flops: counted by hand, for the context of the step.
        weight_bytes: held; read_bytes: of them, read by the step.
        kv_bytes: of keys and values that the step reads.
        all_reduces, all_reduce_bytes: how many arrays are summed over devices, and their bytes.
        all_to_alls, all_to_all_bytes: how many arrays are exchanged by replicas, and their bytes.
        other_bytes: that other collectives yield.
    """

    kind: str
    tensor: int
    num_tokens: int
    num_layers: int
    hidden_size: int
    dtype_bytes: int
    product_flops: int
    attention_flops: int
    weight_bytes: int
    read_bytes: int
    kv_bytes: int
    all_reduces: int
    all_reduce_bytes: int
    other_bytes: int
    data: int = 1
    expert_flops: int = 0
    all_to_alls: int = 0
    all_to_all_bytes: int = 0

    @property
    def chips(self) -> int:
        return self.data * self.tensor

    def compute_seconds(self, device: Device, stages: int = 1) -> float:
        """The longer of arithmetic and memory, of the stage with most layers."""
        products = self.product_flops + self.expert_flops + self.attention_flops
        flops = products / (device.flops * FLOPS_SHARE)
        memory = (self.read_bytes + self.kv_bytes) / (device.bandwidth * BANDWIDTH_SHARE)
        return max(flops, memory) * self._stage_share(stages)

    def all_reduce_seconds(self, links: Interconnect, stages: int = 1) -> float:
        """All of a step's sums, of the stage with most layers."""
        if not self.all_reduces:
            return 0.0
        each = self.all_reduce_bytes / self.all_reduces / LINK_SHARE
        return self.all_reduces * links.all_reduce_seconds(each, self.tensor) * self._stage_share(stages)

    def all_to_all_seconds(self, links: Interconnect) -> float:
        """All that replicas exchange in a step."""
        if not self.all_to_alls:
            return 0.0
        each = self.all_to_all_bytes / self.all_to_alls / LINK_SHARE
        return self.all_to_alls * links.all_to_all_seconds(each, self.chips)

    def _stage_share(self, stages: int) -> float:
        return math.ceil(self.num_layers / stages) / self.num_layers


@dataclass(frozen=True, slots=True)
class Point:
    """A mesh, and what a step takes on it.

    Attributes:
        compute, all_reduce, exchange, hand_on: seconds of a step, or of a tick of a pipeline.
        tokens_per_chip: a second.
    """

    kind: str
    device: str
    plan: str
    data: int
    pipe: int
    tensor: int
    compute: float
    all_reduce: float
    exchange: float
    hand_on: float
    tokens_per_chip: float

    @property
    def chips(self) -> int:
        return self.data * self.pipe * self.tensor

    @property
    def seconds(self) -> float:
        return self.compute + self.all_reduce + self.exchange + self.hand_on


def fitting(decodes: Sequence[Counts], device: Device, links: Interconnect) -> list[tuple[int, int]]:
    """Sizes of (data, tensor), the smallest first, that hold the weights and the KV cache of their requests.

    More devices than KV heads hold copies of them, so that a size may be too large, too.

    Raises:
        ValueError: none of the counted ones do.
    """
    sizes = sorted(
        (one.data, one.tensor)
        for one in decodes
        if one.weight_bytes + one.kv_bytes < device.memory * MEMORY_SHARE and one.tensor <= links.domain
    )
    if not sizes:
        raise ValueError(f"the model fits on no counted number of {device.name}; count more")
    return sizes


def points(counts: Sequence[Counts], device: Device, links: Interconnect, most: int) -> Iterator[Point]:
    """Every mesh up to so many chips.

    Of `tensor` alone, of the smallest `tensor` by `data` or `pipe`, and of replicas that share the experts.
    """
    counts = sorted((one for one in counts if one.chips <= most), key=lambda one: one.chips)
    alone = [one for one in counts if one.data == 1]

    def point(plan: str, one: Counts, data: int, pipe: int) -> Point:
        compute, summing = one.compute_seconds(device, pipe), one.all_reduce_seconds(links, pipe)
        hidden = one.num_tokens * one.hidden_size * one.dtype_bytes / one.tensor
        within = pipe * one.tensor <= links.domain
        hand_on = links.send_seconds(hidden, within=within) if pipe > 1 else 0.0
        exchange = one.all_to_all_seconds(links)
        # A tick completes one batch; each replica has one of its own.
        rate = one.num_tokens / (compute + summing + exchange + hand_on) / (pipe * one.tensor)
        return Point(
            one.kind, device.name, plan, data, pipe, one.tensor, compute, summing, exchange, hand_on, rate
        )

    for one in alone:
        yield point("tensor", one, 1, 1)
    replicas = 1
    while alone and replicas * alone[0].tensor <= most:
        yield point("tensor x data", alone[0], replicas, 1)
        if replicas <= alone[0].num_layers:
            yield point("tensor x pipe", alone[0], 1, replicas)
        replicas *= 2
    for one in counts:
        if one.data > 1:
            yield point("experts over data x tensor", one, one.data, 1)


def takeover(points: Sequence[Point]) -> int | None:
    """The first `tensor` at which devices sum for longer than they compute; None where they never do."""
    alone = [point for point in points if point.plan == "tensor"]
    return next((point.tensor for point in alone if point.all_reduce > point.compute), None)
