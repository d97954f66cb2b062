"""The backends that the attention suite runs over, and how each is run on a machine without its hardware."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import pytest

from pallas_kernels.ragged_paged_attention import ragged_paged_attention
from tests.kernels.oracle import check
from tests.kernels.ragged_batches import Batch, Shape


def _refuses_nothing(shape: Shape) -> str | None:
    return None


@dataclass(frozen=True)
class BackendUnderTest:
    """
    Attributes:
        name: what the op's `backend` argument calls it.
        context: what it runs under, an interpreter's context for instance.
        refuses: for a shape that the backend cannot do, a pattern of the ValueError that says so.
        max_tokens: shapes of more are left out; for interpreters, which are slow.
        batches: how many random batches of each shape.
        draws_lengths: whether hypothesis searches for lengths that fail; not in an interpreter.
    """

    name: str
    context: Callable[[], AbstractContextManager[object]] = nullcontext
    refuses: Callable[[Shape], str | None] = _refuses_nothing
    max_tokens: int = 10**6
    batches: int = 4
    draws_lengths: bool = True

    def __str__(self) -> str:
        return self.name

    def run(self, batch: Batch, shape: Shape) -> tuple[np.ndarray, ...]:
        """(out, cache), and lse where the shape asks for it."""
        with self.context():
            results = _jitted(*batch.operands, **batch.array_options, shape=shape, backend=self.name)
            return tuple(np.asarray(result) for result in results)

    def refused(self, batch: Batch, shape: Shape) -> bool:
        """Whether the backend cannot do the shape; if so, it has been seen to say it."""
        message = self.refuses(shape)
        if message is None:
            return False
        with pytest.raises(ValueError, match=message):
            self.run(batch, shape)
        return True

    def check(self, batch: Batch, shape: Shape) -> None:
        """Raises AssertionError unless the result is right, or refused as `refuses` says."""
        if not self.refused(batch, shape):
            check(batch, shape, *self.run(batch, shape))


@functools.partial(jax.jit, static_argnames=("shape", "backend"), donate_argnums=3)
def _jitted(*operands: Any, shape: Shape, backend: Any, **array_options: Any) -> Any:
    return ragged_paged_attention(
        *operands,
        scale=shape.scale,
        window=shape.window,
        soft_cap=shape.soft_cap,
        decode_only=shape.decode_only,
        return_lse=shape.lse,
        backend=backend,
        **array_options,
    )


def _cpu_refuses(shape: Shape) -> str | None:
    return None if shape.pages_dtype == np.float32 else "reads pages of float32"


BACKENDS = (
    BackendUnderTest("reference"),
    BackendUnderTest("xla"),
    BackendUnderTest("cpu", refuses=_cpu_refuses),
)
on_every_backend = pytest.mark.parametrize("backend", BACKENDS, ids=str)
on_every_fast_backend = pytest.mark.parametrize("backend", [b for b in BACKENDS if b.draws_lengths], ids=str)


def on_every_backend_and(shapes: Mapping[str, Shape]) -> pytest.MarkDecorator:
    """Parametrizes `backend` and `shape`, less those of more tokens than the backend has time for."""
    return pytest.mark.parametrize(
        ("backend", "shape"),
        [
            pytest.param(backend, shape, id=f"{name}-{backend}")
            for backend in BACKENDS
            for name, shape in shapes.items()
            if shape.num_tokens <= backend.max_tokens
        ],
    )
