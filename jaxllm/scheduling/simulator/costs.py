"""How long a step would take, from what a model computes and a device can do."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from jaxllm.models.config import MLAConfig, MoEConfig
from jaxllm.scheduling.plan import Plan
from jaxllm.scheduling.simulator.devices import Device, Interconnect


class StepFeatures(NamedTuple):
    """What the time of a step depends on.

    Attributes:
        num_tokens: tokens computed.
        num_seqs: requests among which they are.
        num_samples: requests whose next token is sampled.
        context: positions whose keys and values are read, over requests.
        attended: pairs of a query and a position that it sees, over requests.
    """

    num_tokens: int
    num_seqs: int
    num_samples: int
    context: int
    attended: int

    @classmethod
    def of(cls, plan: Plan, window: int | None = None) -> StepFeatures:
        """Those of a plan.

        Args:
            window: positions that a query sees at most.
        """
        context = attended = num_samples = 0
        for _, start, num_tokens, samples in plan.scheduled:
            end = start + num_tokens
            num_samples += samples
            if window is None:
                context += end
                attended += num_tokens * start + num_tokens * (num_tokens + 1) // 2
            else:
                context += min(end, window + num_tokens - 1)
                attended += _attended_in_window(start, num_tokens, window)
        return cls(plan.num_tokens, len(plan.scheduled), num_samples, context, attended)


def _attended_in_window(start: int, num_tokens: int, window: int) -> int:
    growing = min(max(window - start, 0), num_tokens)  # queries that still see everything
    return growing * start + growing * (growing + 1) // 2 + (num_tokens - growing) * window


class CostModel(Protocol):
    """Says how long a step takes."""

    def seconds(self, plan: Plan) -> float:
        """Time on the device from the start of a step to its end."""
        ...


@dataclass(frozen=True, slots=True)
class ModelFigures:
    """Sizes of a decoder that the cost of a step follows from.

    Attributes:
        hidden_size: numbers of a token between two layers.
        layer_parameters: weights of all layers that are used for each token.
        head_parameters: weights of the product that yields the logits.
        dtype_bytes: bytes of a weight and of a number in the cache.
        window: positions that a query sees at most; None sees all.
        moe: experts, where there are any.
        expert_parameters: weights of one expert of every layer that has any.
        mla: latent attention, in place of keys and values.
    """

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    layer_parameters: int
    head_parameters: int
    hidden_size: int
    dtype_bytes: int = 2
    window: int | None = None
    moe: MoEConfig | None = None
    expert_parameters: int = 0
    mla: MLAConfig | None = None

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of the cache that one token takes."""
        numbers = 2 * self.num_kv_heads * self.head_dim if self.mla is None else self.mla.width
        return self.num_layers * numbers * self.dtype_bytes

    def cache_shards(self, tensor: int) -> int:
        """Into how many parts chips share the cache: heads, but not a latent, which each chip has."""
        return min(tensor, self.num_kv_heads) if self.mla is None else 1

    @property
    def pair_flops(self) -> int:
        """Of attention, for each query and position that it sees."""
        per_head = 2 * self.head_dim if self.mla is None else self.mla.pair_width
        return 2 * self.num_layers * self.num_heads * per_head

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights, without embeddings that are only looked up."""
        parameters = self.layer_parameters + self.head_parameters
        if self.moe is not None:
            parameters += (self.moe.num_experts - self.moe.experts_per_token) * self.expert_parameters
        return parameters * self.dtype_bytes

    def weight_bytes_read(self, num_tokens: int) -> float:
        """Bytes of those weights that a step of so many tokens reads: of experts, those that some take."""
        if self.moe is None:
            return self.weight_bytes
        unread = self.moe.num_experts - self.moe.experts_read(num_tokens)
        return self.weight_bytes - unread * self.expert_parameters * self.dtype_bytes


@dataclass(frozen=True, slots=True)
class RooflineCost:
    """The slower of arithmetic and memory (Williams et al. 2009), each at a share of its ceiling.

    Attributes:
        model: what is computed.
        device: what it runs on.
        tensor: chips that share every product, and sum what they have over their links twice a layer.
        stages: of a pipeline; a step is one of all stages, and takes as long as that with most layers.
        links: what joins the chips; None leaves the sums out.
        flops_share, bandwidth_share: of the ceilings, that real kernels and links reach.
        overhead: seconds that a step takes beside, for launching.
        page_size: tokens of a KV page, of which some are copied to the host's memory and back.
    """

    model: ModelFigures
    device: Device
    tensor: int = 1
    stages: int = 1
    links: Interconnect | None = None
    flops_share: float = 0.6
    bandwidth_share: float = 0.8
    overhead: float = 1e-3
    page_size: int = 16

    def seconds(self, plan: Plan) -> float:
        """See `CostModel`."""
        model, features = self.model, StepFeatures.of(plan, self.model.window)
        products = 2 * (
            model.layer_parameters * features.num_tokens + model.head_parameters * features.num_samples
        )
        attention = model.pair_flops * features.attended
        kv = (features.context + features.num_tokens) * model.kv_bytes_per_token
        arithmetic = (products + attention) / self.tensor / (self.device.flops * self.flops_share)
        cache_shards = model.cache_shards(self.tensor)
        read = model.weight_bytes_read(features.num_tokens) / self.tensor + kv / cache_shards
        memory = read / (self.device.bandwidth * self.bandwidth_share)
        copied = (len(plan.copies_out) + len(plan.copies_in)) * self.page_size * model.kv_bytes_per_token
        copying = copied / cache_shards / (self.device.host_bandwidth * self.bandwidth_share)
        # Nothing is computed meanwhile: what is copied out makes room, what is copied in is read.
        seconds = max(arithmetic, memory) + copying + self._summing(features.num_tokens)
        return seconds * math.ceil(model.num_layers / self.stages) / model.num_layers + self.overhead

    def _summing(self, num_tokens: int) -> float:
        """Seconds in which the chips sum what attention and the MLP of each layer gave."""
        if self.links is None or self.tensor == 1:
            return 0.0
        each = num_tokens * self.model.hidden_size * self.model.dtype_bytes / self.bandwidth_share
        return 2 * self.model.num_layers * self.links.all_reduce_seconds(each, self.tensor)
