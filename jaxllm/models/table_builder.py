"""What a family's table of tensors is made of: pieces of parameters, by patterns of axes.

A pattern such as `(k g h) d -> k g h d` says how the axes of a tensor on disk lie in a parameter
of ours: `k` KV heads, `g` queries per KV head, `h` head_dim, `a` width of all query heads, `d` hidden
size (`c` too, where both sides have it), `e` embedding width, `f` MLP width, `x` experts, `i` width of an
expert, `s` width of the shared expert, `v` vocabulary, `n` learned positions, `t` token types, `l` labels;
digits stand for themselves. Of latent attention: `z` heads, `w` width of a query, `j` rank of queries,
`r` rank of keys and values, `m` that and the rotated key, `p` and `u` width of a key without rotation and of
a value, `b` both together, `o` all heads' values.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from jaxllm.models.config import MLAConfig, ModelConfig, Pooler

Index = tuple[int | slice, ...]


@dataclass(frozen=True, slots=True)
class Piece:
    """A tensor of a checkpoint, and the part of a parameter that it fills.

    Attributes:
        tensor: its name on disk, without the family's prefix; `{layer}` is the layer's number.
        parameter: our name.
        factors: sizes of the named axes on disk, grouped by the dimensions they are packed into.
        order: for each axis of the filled part, its place among the flattened `factors`.
        at: which part of the parameter it fills: basic indices of the leading axes; () is all.
        layers: numbers of the layers that have one; () where it is not per layer.
        part: which part of the tensor it is, where others take the rest: first and past the last index of
            each axis in `order`; () is all.
    """

    tensor: str
    parameter: str
    factors: tuple[tuple[int, ...], ...]
    order: tuple[int, ...]
    at: Index = ()
    layers: tuple[int, ...] = ()
    part: tuple[tuple[int, int], ...] = ()

    @property
    def disk_shape(self) -> tuple[int, ...]:
        return tuple(math.prod(group) for group in self.factors)

    @property
    def size(self) -> int:
        """Elements that it fills."""
        if self.part:
            return math.prod(stop - start for start, stop in self.part)
        return math.prod(self.disk_shape)

    def name(self, index: int | None) -> str:
        """The tensor's name, for a per-layer one that of the layer at this place in `layers`."""
        return self.tensor if index is None else self.tensor.format(layer=self.layers[index])

    @property
    def names(self) -> tuple[str, ...]:
        """Names in every layer."""
        return tuple(map(self.name, range(len(self.layers)))) if self.layers else (self.tensor,)


@dataclass(frozen=True, slots=True)
class CheckpointTable:
    """All that a checkpoint of a family may hold.

    Attributes:
        pieces: they fill every parameter once, together with one of the alternatives where there are any.
        alternatives: other ways to store the remaining parameters, of which a checkpoint uses one.
        prefixes: of tensor names, of which a checkpoint may carry any one or none.
        ignored: regular expressions, whole names without prefix, of tensors that carry nothing.
        tied: a tensor that may be stored although it is the same as another one, and that other.
    """

    pieces: tuple[Piece, ...]
    prefixes: tuple[str, ...]
    ignored: tuple[str, ...] = ()
    tied: tuple[str, str] | None = None
    alternatives: tuple[tuple[Piece, ...], ...] = ()


class TableBuilder:
    """Collects the pieces of a model's table."""

    def __init__(self, config: ModelConfig) -> None:
        groups = config.queries_per_kv_head
        self.queries = slice(0, groups)
        self.key, self.value = groups, groups + 1
        self._sizes = {
            "k": config.num_kv_heads,
            "g": groups,
            "h": config.head_dim,
            "a": config.num_heads * config.head_dim,
            "d": config.hidden_size,
            "c": config.hidden_size,
            "e": config.embedding_dim,
            "f": config.intermediate_size,
            "x": config.moe.num_experts if config.moe else 0,
            "i": config.moe.intermediate_size if config.moe else 0,
            "s": config.moe.shared_intermediate_size if config.moe else 0,
            "v": config.vocab_size,
            "n": config.num_learned_positions,
            "t": config.num_token_types,
            "l": 0 if config.pooler is None else len(config.pooler.labels),
            **({} if config.mla is None else _latent_sizes(config, config.mla)),
        }
        self._layers = tuple(range(config.num_layers))
        self.pieces: list[Piece] = []

    def add(
        self,
        tensor: str,
        parameter: str,
        pattern: str,
        at: Index = (),
        layers: tuple[int, ...] | None = None,
        part: Mapping[str, tuple[int, int]] | None = None,
    ) -> None:
        """Adds a piece, which is in the layers given (None is all) where its name has a {layer}.

        Args:
            part: of an axis, by its letter, the indices that are taken.
        """
        on_disk, _, in_parameter = pattern.partition("->")
        groups = [match.strip("()").split() for match in re.findall(r"\([^)]*\)|\S+", on_disk)]
        names = [name for group in groups for name in group]
        order = tuple(names.index(name) for name in (in_parameter.split() or names))
        factors = tuple(
            tuple(int(name) if name.isdigit() else self._sizes[name] for name in group) for group in groups
        )
        layers = (self._layers if layers is None else layers) if "{layer}" in tensor else ()
        taken: tuple[tuple[int, int], ...] = ()
        if part is not None:
            flat = [size for group in factors for size in group]
            taken = tuple(part.get(names[axis], (0, flat[axis])) for axis in order)
        self.pieces.append(Piece(tensor, parameter, factors, order, at, layers, taken))

    def size(self, axis: str) -> int:
        """Of an axis, by its letter."""
        return self._sizes[axis]

    def linear(
        self,
        tensor: str,
        parameter: str,
        weight: str,
        bias: str | None = None,
        at: Index = (),
        layers: tuple[int, ...] | None = None,
    ) -> None:
        """Adds a weight and, where there is a pattern for it, a bias."""
        self.add(f"{tensor}.weight", f"{parameter}.weight", weight, at, layers)
        if bias is not None:
            self.add(f"{tensor}.bias", f"{parameter}.bias", bias, at, layers)

    def projections(self, pooler: Pooler) -> None:
        """Adds the layers after the pooling, each from a folder of its own."""
        for i, each in enumerate(pooler.projections):
            tensor, parameter = f"{each.folder}/linear", f"pooler.projection_{i}"
            out, inputs = (each.out_features,), (each.in_features,)
            self.pieces.append(Piece(f"{tensor}.weight", f"{parameter}.weight", (out, inputs), (0, 1)))
            if each.bias:
                self.pieces.append(Piece(f"{tensor}.bias", f"{parameter}.bias", (out,), (0,)))


def _latent_sizes(config: ModelConfig, mla: MLAConfig) -> dict[str, int]:
    return {
        "z": config.num_heads,
        "w": config.head_dim,
        "j": mla.q_lora_rank,
        "r": mla.kv_lora_rank,
        "m": mla.width,
        "p": mla.nope_head_dim,
        "u": mla.value_head_dim,
        "b": mla.nope_head_dim + mla.value_head_dim,
        "o": config.num_heads * mla.value_head_dim,
    }
