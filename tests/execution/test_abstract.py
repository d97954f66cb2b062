"""Parameters are laid out as the steps that read them were compiled."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Format, Layout
from jax.sharding import SingleDeviceSharding

from jaxllm.execution.abstract import laid_out


def test_only_what_lies_otherwise_is_moved() -> None:
    here = SingleDeviceSharding(jax.devices()[0])
    swapped = Format(Layout((1, 0)), here)
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    params = {"as it is": jnp.asarray(values), "moved": jnp.asarray(values), "list": [jnp.asarray(values)]}
    anyhow = jax.ShapeDtypeStruct((3, 4), jnp.float32)
    abstract = {
        "as it is": jax.ShapeDtypeStruct((3, 4), jnp.float32, sharding=Format(Layout((0, 1)), here)),
        "moved": jax.ShapeDtypeStruct((3, 4), jnp.float32, sharding=swapped),
        "list": [anyhow],
    }
    found = laid_out(dict(params), abstract)  # type: ignore[arg-type]
    assert found["as it is"] is params["as it is"]
    assert found["list"][0] is params["list"][0]
    assert found["moved"].format.layout.major_to_minor == (1, 0)  # type: ignore[union-attr]
    np.testing.assert_array_equal(found["moved"], values)
    # What was compiled for that layout takes it.
    run = jax.jit(lambda x: 2 * x, in_shardings=swapped).lower(anyhow).compile()
    np.testing.assert_array_equal(run(found["moved"]), 2 * values)
