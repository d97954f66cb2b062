"""Compiles handlers, or reads what was compiled before, and makes them known to XLA."""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import threading
from pathlib import Path

import jax

from pallas_kernels.native import xla_ffi

_loading = threading.Lock()


def missing(target: str, module: str) -> str | None:
    """What keeps a handler from running here, as the end of a sentence; None is nothing.

    Args:
        target: the name by which XLA is to call it.
        module: where a handler `handle` is, compiled by numba when it is imported.
    """
    if importlib.util.find_spec("numba") is None:
        return "needs numba: pip install numba"
    if (reason := xla_ffi.missing()) is not None:
        return reason
    with _loading:
        return load(target, module)


@functools.cache
def load(target: str, module: str) -> str | None:
    """See `missing`; once for each in a process."""
    import numba

    before = numba.config.CACHE_DIR
    numba.config.CACHE_DIR = str(cache_directory(module))
    try:
        xla_ffi.register(target, importlib.import_module(module).handle.address)
    except (numba.core.errors.NumbaError, RuntimeError, OSError) as error:
        return f"could not be compiled or registered: {str(error).splitlines()[0]}"
    finally:
        numba.config.CACHE_DIR = before
    return None


def cache_directory(module: str) -> Path:
    """Where machine code is kept: beside XLA's own, or where that is kept nowhere, beside Python's.

    Numba looks at the file of the handler alone to see whether what it kept is of now; so there is a folder
    for each content of all that handlers are made of.
    """
    here = Path(__file__).parent
    package = here.parent.parent / Path(*module.split(".")[:-1])
    sources = [*sorted(here.glob("*.py")), *sorted(package.glob("cpu_*.py"))]
    digest = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()
    place = jax.config.jax_compilation_cache_dir or ""  # type: ignore[attr-defined]
    parent = Path(place) if place and "://" not in place else package / "__pycache__"
    return parent / "numba" / digest[:16]
