"""XLA's side of `jax.ffi`, for handlers that are compiled in this process: its structures, and registering.

A handler is a C function from the address of a CALL_FRAME to that of an error, 0 for none. What XLA hands it
is described in `xla/ffi/api/c_api.h`, which JAX installs; within a major version structures only grow.
"""

from __future__ import annotations

import ctypes
import functools
import re
from pathlib import Path

import jax
import numpy as np

# Of JAX 0.10.2, 0.11 and 0.12, for which the structures below were read.
KNOWN_VERSIONS = ((0, 3), (0, 4), (0, 5))
# What a handler says it was built for: XLA takes older minor versions than its own.
VERSION = KNOWN_VERSIONS[0]
EXECUTE = 3  # the stage at which operands may be read
METADATA = 1  # the kind of extension by which XLA asks for a handler's version

_HEAD = [("struct_size", "i8"), ("extension", "i8")]
_VERSION = np.dtype([*_HEAD, ("major", "i4"), ("minor", "i4")], align=True)
_LIST = np.dtype([*_HEAD, ("size", "i8"), ("types", "i8"), ("items", "i8")], align=True)
_ATTRIBUTES = np.dtype(
    [*_HEAD, ("size", "i8"), ("types", "i8"), ("names", "i8"), ("items", "i8")], align=True
)

CALL_FRAME = np.dtype(
    [
        *_HEAD,
        ("api", "i8"),
        ("context", "i8"),
        ("stage", "i4"),
        ("operands", _LIST),
        ("results", _LIST),
        ("attributes", _ATTRIBUTES),
    ],
    align=True,
)
BUFFER = np.dtype([*_HEAD, ("dtype", "i4"), ("data", "i8"), ("rank", "i8"), ("dims", "i8")], align=True)
EXTENSION = np.dtype([("struct_size", "i8"), ("kind", "i4"), ("next", "i8"), ("metadata", "i8")], align=True)
HANDLER_METADATA = np.dtype([("struct_size", "i8"), ("version", _VERSION), ("traits", "u4")], align=True)
API = np.dtype(
    [
        *_HEAD,
        ("version", _VERSION),
        ("internal", "i8"),
        ("error_create", "i8"),
        ("error_get_message", "i8"),
        ("error_destroy", "i8"),
        ("_others", "i8", (8,)),
        ("thread_pool_schedule", "i8"),
        ("thread_pool_num_threads", "i8"),
    ],
    align=True,
)
ERROR_CREATE = np.dtype([*_HEAD, ("message", "i8"), ("code", "i4")], align=True)
ERROR_DESTROY = np.dtype([*_HEAD, ("error", "i8")], align=True)
SCHEDULE = np.dtype([*_HEAD, ("context", "i8"), ("task", "i8"), ("data", "i8")], align=True)
NUM_THREADS = np.dtype([*_HEAD, ("context", "i8"), ("num_threads", "i8")], align=True)
RESOURCE_EXHAUSTED = 8


@functools.cache
def missing() -> str | None:
    """What keeps handlers from being registered here, as the end of a sentence; None is nothing."""
    header = Path(jax.ffi.include_dir()) / "xla" / "ffi" / "api" / "c_api.h"
    try:
        found = dict(re.findall(r"#define XLA_FFI_API_(MAJOR|MINOR) (\d+)", header.read_text()))
        version = int(found["MAJOR"]), int(found["MINOR"])
    except (OSError, KeyError):
        return f"needs the version of XLA's FFI, and there is none in {header}"
    if version not in KNOWN_VERSIONS:
        known = ", ".join(f"{major}.{minor}" for major, minor in KNOWN_VERSIONS)
        return f"knows versions {known} of XLA's FFI, and this is {version[0]}.{version[1]}"
    return None


def register(name: str, address: int) -> None:
    """Makes the handler at an address known to XLA on CPUs; once for each name in a process.

    Raises:
        RuntimeError: XLA takes no handler of the version that this one says it is of.
    """
    jax.local_devices(backend="cpu")  # before there are any, XLA would look at no handler
    jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(ctypes.c_void_p(address)), platform="cpu")
