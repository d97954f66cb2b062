"""What this machine can do at best: the ceilings that the other benchmarks measure against.

    python -m benchmarks.machine

Bandwidth is that of reading, and of copying (bytes read plus bytes written), an array far larger than any
cache. FLOP/s are those of a square matrix product. All are the best of several runs.
"""

from __future__ import annotations

import argparse
import os
import platform
from dataclasses import dataclass
from pathlib import Path

from benchmarks.report import add_output_arguments, print_table, write_json
from jaxllm.scheduling.simulator import best_seconds, host_bandwidth


@dataclass(frozen=True, slots=True)
class Machine:
    """Measured ceilings of one device, and what it is.

    Attributes:
        read_bandwidth, copy_bandwidth: bytes per second.
        matmul_flops: dtype name -> floating-point operations per second.
    """

    device: str
    platform: str
    num_devices: int
    cpu_cores: int
    python: str
    jax: str
    read_bandwidth: float
    copy_bandwidth: float
    matmul_flops: dict[str, float]

    def flops(self, dtype: str) -> float:
        """The matrix-product ceiling for weights of this dtype; float32's where it was not measured."""
        return self.matmul_flops.get(dtype, self.matmul_flops["float32"])

    def describe(self) -> str:
        flops = ", ".join(f"{name} {value / 1e9:,.0f} GFLOP/s" for name, value in self.matmul_flops.items())
        return (
            f"{self.device}, read {self.read_bandwidth / 1e9:.1f} GB/s, "
            f"copy {self.copy_bandwidth / 1e9:.1f} GB/s, {flops}"
        )


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _device_bandwidth(num_bytes: int) -> tuple[float, float]:
    import jax
    import jax.numpy as jnp

    array = jnp.ones(num_bytes // 4, jnp.float32)
    read = jax.jit(jnp.max)
    copy = jax.jit(lambda x: x + 1)
    read_seconds = best_seconds(lambda: read(array).block_until_ready())
    copy_seconds = best_seconds(lambda: copy(array).block_until_ready())
    return num_bytes / read_seconds, 2 * num_bytes / copy_seconds


def _matmul_flops(dtype: str, size: int) -> float:
    import jax
    import jax.numpy as jnp

    keys = jax.random.split(jax.random.key(0))
    a, b = (jax.random.normal(key, (size, size), dtype) for key in keys)
    product = jax.jit(jnp.matmul)
    return 2 * size**3 / best_seconds(lambda: product(a, b).block_until_ready())


def measure() -> Machine:
    """Measures the default JAX device, in a few seconds."""
    import jax

    device = jax.devices()[0]
    on_cpu = device.platform == "cpu"
    if on_cpu:
        read, copy = host_bandwidth(512 << 20)
    else:
        read, copy = _device_bandwidth(4 << 30)
    # bfloat16 is emulated on CPUs, far below what any engine would use there.
    sizes = {"float32": 2048} if on_cpu else {"float32": 4096, "bfloat16": 8192}
    return Machine(
        device=cpu_name() if on_cpu else device.device_kind,
        platform=device.platform,
        num_devices=len(jax.devices()),
        cpu_cores=len(os.sched_getaffinity(0)),
        python=platform.python_version(),
        jax=jax.__version__,
        read_bandwidth=read,
        copy_bandwidth=copy,
        matmul_flops={dtype: _matmul_flops(dtype, size) for dtype, size in sizes.items()},
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.machine", description=__doc__.split("\n")[0])
    add_output_arguments(parser, plot=False)
    options = parser.parse_args(arguments)
    machine = measure()
    rows: list[list[object]] = [
        ["read", f"{machine.read_bandwidth / 1e9:.1f} GB/s"],
        ["copy", f"{machine.copy_bandwidth / 1e9:.1f} GB/s"],
    ]
    rows += [[f"{n} product", f"{f / 1e9:,.0f} GFLOP/s"] for n, f in machine.matmul_flops.items()]
    title = f"{machine.num_devices} x {machine.device} ({machine.platform}), {machine.cpu_cores} CPU cores"
    print_table(title, ["ceiling", "measured"], rows, note=f"Python {machine.python}, JAX {machine.jax}")
    write_json(options.json, machine)


if __name__ == "__main__":
    main()
