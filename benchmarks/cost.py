"""How much a workload has to compute and to move at the very least, counted from the model's config."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

from benchmarks.machine import Machine
from benchmarks.workloads import Workload
from jaxllm.models.config import MLAConfig, ModelConfig, MoEConfig

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class Work:
    """Floating-point operations, and bytes read from and written to device memory."""

    flops: float
    bytes: float

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.bytes + other.bytes)

    @property
    def intensity(self) -> float:
        """FLOPs per byte: left of the machine's own ratio, memory is the limit; right of it, arithmetic."""
        return self.flops / self.bytes

    def fastest_seconds(self, machine: Machine, dtype: str) -> float:
        """Time on a machine that reaches its ceilings, both at once."""
        return max(self.flops / machine.flops(dtype), self.bytes / machine.read_bandwidth)


@dataclass(frozen=True, slots=True)
class ModelCost:
    """Sizes of a decoder that its costs follow from.

    Attributes:
        layer_parameters: weights of all layers' linear products that are used once a token.
        expert_parameters: weights of one expert of every layer that has any.
        head_parameters: weights of the product that yields the logits, whether tied or not.
        embedding_parameters: weights that are only looked up.
        windows: how many layers have this sliding window (None: full attention).
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    layer_parameters: int
    head_parameters: int
    embedding_parameters: int
    windows: dict[int | None, int]
    dtype_bytes: int
    expert_parameters: int = 0
    moe: MoEConfig | None = None
    mla: MLAConfig | None = None

    @classmethod
    def from_config(cls, config: ModelConfig, dtype: str) -> ModelCost:
        """Counts a model whose weights and cache have this dtype.

        Raises:
            KeyError: if the dtype is not one of `DTYPE_BYTES`.
        """
        return cls(
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            layer_parameters=config.layer_parameters,
            head_parameters=config.head_parameters,
            embedding_parameters=(0 if config.tie_word_embeddings else config.head_parameters)
            + config.num_learned_positions * config.hidden_size,
            windows=dict(Counter(config.layer_windows or (None,) * config.num_layers)),
            dtype_bytes=DTYPE_BYTES[dtype],
            expert_parameters=config.expert_parameters,
            moe=config.moe,
            mla=config.mla,
        )

    @property
    def num_layers(self) -> int:
        return sum(self.windows.values())

    @property
    def num_parameters(self) -> int:
        """Weights in all, but for norms and biases."""
        all_layers = self.layer_parameters
        if self.moe is not None:
            all_layers += (self.moe.num_experts - self.moe.experts_per_token) * self.expert_parameters
        return all_layers + self.head_parameters + self.embedding_parameters

    def layer_parameters_read(self, num_tokens: int) -> float:
        """Weights of all layers that a step of so many tokens reads."""
        if self.moe is None:
            return self.layer_parameters
        others = self.moe.experts_read(num_tokens) - self.moe.experts_per_token
        return self.layer_parameters + others * self.expert_parameters

    def seen(self, position: int) -> int:
        """How many positions a query at `position` sees, itself included, summed over layers."""
        return sum(
            layers * min(position + 1, window or position + 1) for window, layers in self.windows.items()
        )

    def step(self, num_tokens: int, num_logits: int, attended: int, context: int) -> Work:
        """One forward pass.

        Args:
            num_tokens: tokens computed.
            num_logits: positions whose logits are wanted.
            attended: pairs of a query and a position that it sees, over sequences and layers.
            context: positions whose keys and values are read, over sequences and layers.
        """
        products = 2 * (self.layer_parameters * num_tokens + self.head_parameters * num_logits)
        per_head = 2 * self.head_dim if self.mla is None else self.mla.pair_width
        attention = 2 * self.num_heads * per_head * attended
        weights = self.layer_parameters_read(num_tokens) + (self.head_parameters if num_logits else 0)
        token = 2 * self.num_kv_heads * self.head_dim if self.mla is None else self.mla.width
        kv = token * (context + self.num_layers * num_tokens)
        return Work(float(products + attention), float(self.dtype_bytes * (weights + kv)))

    def workload(self, workload: Workload, *, max_num_batched_tokens: int) -> Work:
        """The whole of a workload: its prompts packed into full steps, then one step a token.

        Shared prompt tokens are computed once. Activations are not counted: at best they stay on chip.
        """
        n, length, shared = workload.num_prompts, workload.input_len, workload.shared_len
        tokens = workload.num_computed_prompt_tokens
        attended = sum(self.seen(position) for position in range(shared))
        attended += n * sum(self.seen(position) for position in range(shared, length))
        # Of the cache, a prefill has to read what it did not compute itself: the shared prefix.
        context = (n - 1) * self.seen(shared - 1) if shared else 0
        total = self.step(tokens, n, attended, context)
        # All but one of the steps read the layers' weights once more, for as many tokens as they hold.
        for _ in range(math.ceil(tokens / max_num_batched_tokens) - 1):
            total += Work(0.0, self.dtype_bytes * self.layer_parameters_read(max_num_batched_tokens))
        for output in range(1, workload.output_len):
            seen = n * self.seen(length + output - 1)
            total += self.step(n, n, seen, seen)
        return total
