"""What differs between CPU, GPU and TPU: forms, defaults and compiler options; nothing that is computed."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

import jax


@dataclass(frozen=True, slots=True)
class Platform:
    """How to run on a kind of device.

    Attributes:
        feature_major: activations as [features, T]; on CPU the faster form of a product by far.
        stack_layers: one array for the weights of all layers. On CPU a scan over it would copy them.
        compiler_options: of every step.
        default_max_num_seqs, default_max_num_batched_tokens: where the user leaves them open.
        checkpoint_dtype: whether dtype="auto" follows the checkpoint; on CPU bfloat16 is emulated,
            50 to 100 times slower than float32.
    """

    name: str
    feature_major: bool = False
    stack_layers: bool = True
    compiler_options: dict[str, bool | str] = field(default_factory=dict)
    default_max_num_seqs: int = 256
    default_max_num_batched_tokens: int = 8192
    checkpoint_dtype: bool = True


_PLATFORMS = {
    "cpu": Platform(
        "cpu",
        feature_major=True,
        stack_layers=False,
        default_max_num_seqs=64,
        default_max_num_batched_tokens=2048,
        checkpoint_dtype=False,
    ),
    # Triton products take no dynamic slice, so a scan would copy each layer's weights; cuBLAS does.
    "gpu": Platform("gpu", compiler_options={"xla_gpu_enable_triton_gemm": False}),
    "tpu": Platform("tpu"),
}


def current_platform() -> Platform:
    """The platform of JAX's default devices; an unknown one is treated as a GPU without its options."""
    name = jax.default_backend()
    name = {"cuda": "gpu", "rocm": "gpu"}.get(name, name)
    return _PLATFORMS.get(name, Platform(name))


def compute_capability() -> float | None:
    """Of the default device, where that is an NVIDIA GPU."""
    capability = getattr(jax.devices()[0], "compute_capability", "")
    try:
        return float(capability)
    except ValueError:
        return None  # other makers' GPUs have names such as gfx942


def free_memory(device: jax.Device) -> tuple[int, int]:
    """(total, free) bytes of memory that arrays on the device can use."""
    stats = device.memory_stats() if device.platform != "cpu" else None
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"], stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    return host_memory(), _available_host_memory(os.sysconf("SC_PAGE_SIZE"))


def host_memory() -> int:
    """Bytes of memory that the machine has."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _available_host_memory(page: int) -> int:
    try:
        with open("/proc/meminfo") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass  # not Linux: what sysconf calls available is the nearest there is
    return os.sysconf("SC_AVPHYS_PAGES") * page
