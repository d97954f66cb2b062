"""Which tokens the grammars of a batch allow, as an argument of `sample_late`."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from jaxllm.execution.pending import LateRow
from jaxllm.text.grammar import GrammarMatcher, fill_masks


class TokenMasks:
    """Makes the masks of a step: a bit for each token of the vocabulary, for each of its sequences.

    Args:
        vocab_size: of the model.
        num_logits: of a row, where devices share a vocabulary that was filled up for them.
        sharding: where the masks lie; None is one device.
        replicas: that have so many sequences each, one after the other.
    """

    def __init__(
        self,
        vocab_size: int,
        num_logits: int | None = None,
        sharding: NamedSharding | None = None,
        replicas: int = 1,
    ) -> None:
        self._sharding = sharding
        self._replicas = replicas
        self._num_known_words = -(-vocab_size // 32)
        self._num_words = -(-(num_logits or vocab_size) // 32)
        self._unrestricted: dict[int, jax.Array] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="jaxllm-masks")

    def abstract(self, num_seqs: int) -> jax.ShapeDtypeStruct:
        """What the masks of a step look like: int32[S, ceil(V / 32)] of each replica."""
        shape = (self._replicas * num_seqs, self._num_words)
        return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=self._sharding)

    def of(self, rows: Sequence[LateRow], num_seqs: int) -> np.ndarray | None:
        """The masks of a step, all ones where no grammar is in force; None where none has one.

        The grammars must have seen all tokens, and belong to one thread at a time.

        Args:
            num_seqs: that the step has for each replica.
        """
        matchers = [
            (cast(GrammarMatcher, late.request.grammar), late.row)
            for late in rows
            if late.request.grammar is not None
        ]
        if not matchers:
            return None
        masks = np.full((self._replicas * num_seqs, self._num_known_words), -1, np.int32)
        fill_masks(matchers, masks)
        if self._num_words == self._num_known_words:
            return masks
        wide = np.full((len(masks), self._num_words), -1, np.int32)
        wide[:, : self._num_known_words] = masks
        return wide

    def begin(self, rows: Sequence[LateRow], num_seqs: int) -> Future[np.ndarray | None]:
        """The same on a thread of its own, while the host does something else."""
        return self._thread.submit(self.of, rows, num_seqs)

    def unrestricted(self, num_seqs: int) -> jax.Array:
        """Masks that allow everything, on the devices already."""
        if num_seqs not in self._unrestricted:
            ones = np.full((self._replicas * num_seqs, self._num_words), -1, np.int32)
            self._unrestricted[num_seqs] = (
                jax.device_put(ones)
                if self._sharding is None
                else jax.make_array_from_callback(ones.shape, self._sharding, lambda index: ones[index])
            )
        return self._unrestricted[num_seqs]

    def close(self) -> None:
        """Lets the thread go."""
        self._thread.shutdown(wait=False)
