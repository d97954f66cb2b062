"""Which tokens the grammars of a batch allow, as an argument of the step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.scheduling.plan import ScheduledRequest
from jaxllm.text.grammar import GrammarMatcher, fill_masks


class TokenMasks:
    """Makes the masks of a step: a bit for each token of the vocabulary, for each of its sequences.

    A batch without grammars is given masks that are on the device already and are not looked at.
    """

    def __init__(self, vocab_size: int) -> None:
        self._num_words = -(-vocab_size // 32)
        self._unused: dict[int, jax.Array] = {}

    def abstract(self, num_seqs: int) -> jax.ShapeDtypeStruct:
        """What the masks of a step look like: int32[S, ceil(V / 32)]."""
        return jax.ShapeDtypeStruct((num_seqs, self._num_words), jnp.int32)

    def of(self, scheduled: Sequence[ScheduledRequest], num_seqs: int) -> tuple[np.ndarray | jax.Array, bool]:
        """The masks of a plan's sequences, and whether any of them forbids anything.

        Args:
            num_seqs: rows of the step that the plan runs in.
        """
        matchers = [
            (cast(GrammarMatcher, entry.request.grammar), row)
            for row, entry in enumerate(scheduled)
            if entry.samples and entry.request.grammar is not None
        ]
        if not matchers:
            if num_seqs not in self._unused:
                self._unused[num_seqs] = jax.device_put(np.zeros((num_seqs, self._num_words), np.int32))
            return self._unused[num_seqs], False
        masks = np.full((num_seqs, self._num_words), -1, np.int32)
        fill_masks(matchers, masks)
        return masks, True
