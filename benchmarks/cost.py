"""How much a workload has to compute and to move at the very least, counted from the model's config."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from benchmarks.machine import Machine
from benchmarks.workloads import Workload

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
        layer_parameters: weights of all layers' linear products; each is used once a token.
        head_parameters: weights of the product that yields the logits, whether tied or not.
    """

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    layer_parameters: int
    head_parameters: int
    embedding_parameters: int
    dtype_bytes: int
    sliding_window: int | None = None

    @classmethod
    def from_config(cls, config: dict[str, Any], dtype: str) -> ModelCost:
        """Reads a Hugging Face config of a Llama-like model.

        Raises:
            KeyError: if the config lacks a size, or the dtype is not one of `DTYPE_BYTES`.
        """
        hidden = config["hidden_size"]
        num_heads = config["num_attention_heads"]
        num_kv_heads = config.get("num_key_value_heads") or num_heads
        head_dim = config.get("head_dim") or hidden // num_heads
        attention = hidden * head_dim * (2 * num_heads + 2 * num_kv_heads)
        mlp = 3 * hidden * config["intermediate_size"]
        vocabulary = config["vocab_size"] * hidden
        return cls(
            num_layers=config["num_hidden_layers"],
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            layer_parameters=config["num_hidden_layers"] * (attention + mlp),
            head_parameters=vocabulary,
            embedding_parameters=0 if config.get("tie_word_embeddings") else vocabulary,
            dtype_bytes=DTYPE_BYTES[dtype],
            sliding_window=config.get("sliding_window"),
        )

    @property
    def num_parameters(self) -> int:
        """Weights in all, but for norms and biases."""
        return self.layer_parameters + self.head_parameters + self.embedding_parameters

    @property
    def kv_bytes_per_token(self) -> int:
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.dtype_bytes

    def step(self, num_tokens: int, num_logits: int, num_attended: int, num_context: int) -> Work:
        """One forward pass.

        Args:
            num_tokens: tokens computed.
            num_logits: positions whose logits are wanted.
            num_attended: pairs of a query and a position that it sees, over all sequences.
            num_context: positions whose keys and values are read, over all sequences.
        """
        products = 2 * (self.layer_parameters * num_tokens + self.head_parameters * num_logits)
        attention = 4 * self.num_layers * self.num_heads * self.head_dim * num_attended
        weights = self.layer_parameters + (self.head_parameters if num_logits else 0)
        kv = self.kv_bytes_per_token * (num_context + num_tokens)
        return Work(float(products + attention), float(self.dtype_bytes * weights + kv))

    def workload(self, workload: Workload, *, max_num_batched_tokens: int) -> Work:
        """The whole of a workload: its prompts packed into full steps, then one step a token.

        Shared prompt tokens are computed once. Activations are not counted: they stay in caches.
        """
        n, length, shared = workload.num_prompts, workload.input_len, workload.shared_len
        tokens = workload.num_computed_prompt_tokens
        steps = math.ceil(tokens / max_num_batched_tokens)
        own = sum(self._seen(position) for position in range(shared, length))
        attended = sum(self._seen(position) for position in range(shared)) + n * own
        # Keys and values of earlier chunks and of the shared prefix are read again; the rest is at hand.
        prefill = self.step(tokens, n, attended, n * shared)
        again = self.step(0, 0, 0, 0)
        total = Work(prefill.flops, prefill.bytes + (steps - 1) * again.bytes)
        for output in range(1, workload.output_len):
            context = n * self._seen(length + output - 1)
            total += self.step(n, n, context, context)
        return total

    def _seen(self, position: int) -> int:
        """How many positions a query at `position` sees, itself included."""
        return min(position + 1, self.sliding_window or position + 1)
