"""Products with weights: against float64, and the same for a token whatever the others are."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import matmul as op
from pallas_kernels.matmul import cpu, matmul

# (out, in, tokens): fewer rows than a strip, blocks that end within one, each width of tiles, tokens that
# fill none, and depths of several panels.
SHAPES = [
    (1, 1, 1),
    (33, 7, 5),
    (577, 100, 8),
    (960, 576, 16),
    (50, 65, 24),
    (100, 577, 32),
    (3, 5, 40),
    (97, 5000, 64),
    (1000, 600, 129),
    (17, 20000, 70),
]


def operands(out: int, depth: int, tokens: int, count: int = 3) -> tuple[list[jax.Array], jax.Array]:
    generator = np.random.default_rng([out, depth, tokens])
    weights = [jnp.asarray(generator.normal(size=(out, depth)), jnp.float32) for _ in range(count)]
    return weights, jnp.asarray(generator.normal(size=(depth, tokens)), jnp.float32)


@pytest.mark.parametrize("backend", op.BACKENDS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: " x ".join(map(str, shape)))
def test_equals_float64(shape: tuple[int, int, int], backend: op.Backend) -> None:
    weights, x = operands(*shape)
    x64 = np.asarray(x, np.float64)
    for index, tokens_first in ((0, False), (2, True)):
        run = jax.jit(
            lambda weights, index, x, f=tokens_first: matmul(
                weights, index, x, tokens_first=f, backend=backend
            )
        )
        found = np.asarray(run(weights, jnp.int32(index), x))
        expected = np.asarray(weights[index], np.float64) @ x64
        expected = expected.T if tokens_first else expected
        # Sums of up to 4,096 numbers one after the other are out by 1e-6 of their size; panels add up apart.
        assert np.linalg.norm(found - expected) <= 3e-6 * np.linalg.norm(expected)


def test_a_token_is_the_same_alone_bit_for_bit() -> None:
    weights, x = operands(600, 5000, 150, count=1)
    whole = np.asarray(matmul(weights, 0, x, backend="cpu"))
    for first, count in ((0, 1), (3, 4), (17, 8), (40, 16), (41, 31), (77, 64), (20, 130)):
        part = np.asarray(matmul(weights, 0, x[:, first : first + count], backend="cpu"))
        np.testing.assert_array_equal(part, whole[:, first : first + count])


def test_a_wrong_index_would_be_seen() -> None:
    weights, x = operands(64, 32, 4)
    right, wrong = (np.asarray(matmul(weights, index, x, backend="cpu")) for index in (1, 2))
    assert np.abs(right - wrong).max() > 1


def test_nothing_is_copied_in_a_loop_of_layers() -> None:
    weights, x = operands(256, 256, 8)

    def run(weights: list[jax.Array], x: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, 3, lambda index, x: matmul(weights, index, x, backend="cpu"), x)

    compiled = jax.jit(run).lower(weights, x).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < weights[0].nbytes


@pytest.mark.parametrize("shape", [(0, 4, 3), (4, 0, 3), (4, 3, 0)], ids=str)
def test_nothing_to_multiply(shape: tuple[int, int, int]) -> None:
    weights, x = operands(*shape)
    found = matmul(weights, 1, x, backend="cpu")
    np.testing.assert_array_equal(found, np.zeros((shape[0], shape[2]), np.float32))


def test_it_runs_where_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    assert op.default_backend(jnp.float32) == "cpu"
    assert op.default_backend(jnp.bfloat16) == "xla"
    monkeypatch.setattr(cpu, "missing", lambda dtype: "needs numba")
    assert op.default_backend(jnp.float32) == "xla"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": []}, r"all alike.*got none and"),
        ({"x": jnp.zeros((5, 2))}, r"got float32\[4, 3\] and \(5, 2\)"),
        ({"x": jnp.zeros((3, 2), jnp.bfloat16)}, r"one dtype; got float32 and bfloat16"),
        ({"backend": "gpu"}, r"backend='gpu'; there are cpu, xla"),
        (
            {
                "weights": [jnp.zeros((4, 3), jnp.bfloat16)],
                "x": jnp.zeros((3, 2), jnp.bfloat16),
                "backend": "cpu",
            },
            r"backend='cpu' multiplies float32, and these are bfloat16; or take 'xla'",
        ),
    ],
    ids=["none", "shape", "dtype", "backend", "narrow"],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"weights": [jnp.zeros((4, 3))], "x": jnp.zeros((3, 2))} | change
    with pytest.raises(ValueError, match=message):
        matmul(arguments.pop("weights"), 0, arguments.pop("x"), **arguments)
