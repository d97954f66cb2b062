"""Which tokens the grammars of a batch allow, as an argument of the step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from jaxllm.request import Request
from jaxllm.scheduling.plan import ScheduledRequest
from jaxllm.text.grammar import GrammarMatcher, fill_masks


class TokenMasks:
    """Makes the masks of a step: a bit for each token of the vocabulary, for each of its sequences.

    The mask of a sequence depends on its newest token. It is begun as soon as that is known, on a thread of
    its own, while the host writes outputs down and plans the next step. A batch without grammars runs with
    masks that are on the device already and are not looked at.

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
        self._unused: dict[int, jax.Array] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="jaxllm-masks")
        self._begun: Future[dict[Request, np.ndarray]] | None = None

    def abstract(self, num_seqs: int) -> jax.ShapeDtypeStruct:
        """What the masks of a step look like: int32[S, ceil(V / 32)] of each replica."""
        shape = (self._replicas * num_seqs, self._num_words)
        return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=self._sharding)

    def begin(self, requests: Iterable[Request]) -> None:
        """Starts on the masks of those among the requests that have a grammar and go on."""
        # A matcher is for one thread at a time.
        self._take()
        constrained = [r for r in requests if r.grammar is not None and not r.status.is_finished]
        if constrained:
            self._begun = self._thread.submit(self._fill, constrained)

    def of(
        self, scheduled: Sequence[ScheduledRequest], rows: Sequence[int], num_seqs: int
    ) -> np.ndarray | None:
        """The masks of a plan's sequences; None where nothing forbids anything.

        Args:
            rows: of each of them in the step that the plan runs in.
            num_seqs: that this step has for each replica.
        """
        constrained = {
            entry.request: row
            for row, entry in zip(rows, scheduled, strict=True)
            if entry.samples and entry.request.grammar is not None
        }
        if not constrained:
            return None
        known = self._take()
        known |= self._fill([request for request in constrained if request not in known])
        masks = np.full((self._replicas * num_seqs, self._num_words), -1, np.int32)
        for request, row in constrained.items():
            masks[row, : self._num_known_words] = known[request]
        return masks

    def unused(self, num_seqs: int) -> jax.Array:
        """Masks that are not looked at, on the devices already."""
        if num_seqs not in self._unused:
            none = np.zeros((self._replicas * num_seqs, self._num_words), np.int32)
            self._unused[num_seqs] = (
                jax.device_put(none)
                if self._sharding is None
                else jax.make_array_from_callback(none.shape, self._sharding, lambda index: none[index])
            )
        return self._unused[num_seqs]

    def resized(self, masks: np.ndarray, num_seqs: int) -> np.ndarray:
        """Masks of `of` for as many rows as a step has for each replica; new rows are padding."""
        old = masks.reshape(self._replicas, -1, self._num_words)
        count = min(old.shape[1], num_seqs)
        resized = np.full((self._replicas, num_seqs, self._num_words), -1, np.int32)
        resized[:, :count] = old[:, :count]
        return resized.reshape(-1, self._num_words)

    def _fill(self, requests: Sequence[Request]) -> dict[Request, np.ndarray]:
        masks = np.full((len(requests), self._num_known_words), -1, np.int32)
        fill_masks([(cast(GrammarMatcher, r.grammar), row) for row, r in enumerate(requests)], masks)
        return dict(zip(requests, masks, strict=True))

    def _take(self) -> dict[Request, np.ndarray]:
        """What was begun, once it is there; each time for one plan alone."""
        begun, self._begun = self._begun, None
        return {} if begun is None else begun.result()

    def close(self) -> None:
        """Lets the thread go."""
        self._thread.shutdown(wait=False)
