"""The online softmax (FlashAttention-2, Dao 2023, section 3.1) down the columns of a panel of logits.

Rows are keys and columns queries; a step is what `columns.walk` makes of the rows.
"""

from __future__ import annotations

import math
from typing import Any

from pallas_kernels.native.columns import Vectors, walk


def _add_bias(vectors: Vectors, key: Any, logits: Any, slopes: Any, positions: Any) -> tuple[Any, ...]:
    """Adds each head's slope times how far a key is from the query."""
    distance = vectors.subtract(vectors.as_floats(key), positions)
    return vectors.add(logits, vectors.multiply(slopes, distance)), slopes, positions


def _mask(vectors: Vectors, key: Any, logits: Any, first: Any, end: Any) -> tuple[Any, ...]:
    """Minus infinity where a query does not see a key by its position."""
    return vectors.where(vectors.within(first, key, end), logits, vectors.number(-math.inf)), first, end


def _raise_maxima(vectors: Vectors, key: Any, logits: Any, maxima: Any) -> tuple[Any, ...]:
    """The largest logits of each query."""
    return None, vectors.larger(logits, maxima)


def _to_decay(vectors: Vectors, key: Any, new_maxima: Any, maxima: Any, sums: Any) -> tuple[Any, ...]:
    """One row: new maxima become what the sums so far are to be multiplied by; sums and maxima follow."""
    decay = vectors.exp(vectors.subtract(maxima, new_maxima))
    return decay, new_maxima, vectors.multiply(sums, decay)


def _multiply(vectors: Vectors, key: Any, row: Any, factors: Any) -> tuple[Any, ...]:
    return vectors.multiply(row, factors), factors


def _to_weights(vectors: Vectors, key: Any, logits: Any, maxima: Any, sums: Any) -> tuple[Any, ...]:
    """e^(logit - maximum), and its sum."""
    weights = vectors.exp(vectors.subtract(logits, maxima))
    return weights, maxima, vectors.add(sums, weights)


def softmax_steps(vectors: int, width: int) -> tuple[Any, ...]:
    """For panels of so many vectors: add_bias, mask, raise_maxima, to_decay, scale and to_weights."""
    of_floats = [(_add_bias, 2), (_raise_maxima, 1), (_to_decay, 2), (_multiply, 1), (_to_weights, 2)]
    bias, *others = (walk(step, ["floats"] * states, vectors, width) for step, states in of_floats)
    return bias, walk(_mask, ["ints", "ints"], vectors, width), *others


def scale_rows(vectors: int, width: int) -> Any:
    """Multiplies each column by a factor."""
    return walk(_multiply, ["floats"], vectors, width)
