"""Imports go one way, downwards, and the parts that promise to do without JAX do."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import jaxllm

ROOT = Path(__file__).parent.parent

# Highest first. A module may import its own level and every level below; a level is one part of the
# house, or several that know nothing of each other.
LEVELS: list[set[str]] = [
    {"jaxllm.__main__"},
    {"jaxllm.cli"},
    {"jaxllm.chat", "jaxllm.complete", "jaxllm.run_batch", "jaxllm.collect_env"},
    {"jaxllm.terminal"},
    {"jaxllm.serve", "jaxllm.replay"},
    {"jaxllm.llm", "jaxllm.async_engine", "jaxllm.convert", "jaxllm.plan", "jaxllm.simulate"},
    {"jaxllm.beam_search", "jaxllm.pooling_methods"},
    {"jaxllm.engine", "jaxllm.scoring"},
    {"jaxllm.pooling_processor"},
    {
        "jaxllm.execution",
        "jaxllm.input_processor",
        "jaxllm.output_processor",
        "jaxllm.stats",
        "jaxllm.tracing",
    },
    {"jaxllm.models"},
    {"jaxllm.layers"},
    {"jaxllm.scheduling"},
    {"jaxllm.text"},
    {"jaxllm.request"},
    {"jaxllm.progress", "jaxllm.output_stream", "jaxllm.input_threads"},
    {
        "jaxllm.sampling_params",
        "jaxllm.pooling_params",
        "jaxllm.inputs",
        "jaxllm.config",
        "jaxllm.outputs",
        "jaxllm.pooling_outputs",
    },
    {"jaxllm.structured_outputs"},
    {"jaxllm.validation"},
    {"jaxllm.models.config", "jaxllm.demo", "jaxllm.errors"},
]

WITHOUT_JAX = [
    "jaxllm",
    "jaxllm.config",
    "jaxllm.errors",
    "jaxllm.inputs",
    "jaxllm.models.config",
    "jaxllm.outputs",
    "jaxllm.pooling_outputs",
    "jaxllm.pooling_params",
    "jaxllm.pooling_processor",
    "jaxllm.request",
    "jaxllm.sampling_params",
    "jaxllm.scheduling",
    "jaxllm.stats",
    "jaxllm.text",
]

# What the two packages below jaxllm may import beside the standard library and themselves.
JAX_ONLY = {"absl", "jax", "jax_triton", "jaxlib", "jaxtyping", "ml_dtypes", "numpy", "triton"}
JAX_ONLY |= {"llvmlite", "numba"}


def part_of(module: str) -> str | None:
    """The part of the house that a module of jaxllm belongs to; None for the package itself."""
    parts = {part for level in LEVELS for part in level}
    names = module.split(".")
    for length in range(len(names), 1, -1):
        candidate = ".".join(names[:length])
        if candidate in parts:
            return candidate
    if module == "jaxllm":
        return None
    raise AssertionError(f"{module} is in no level: add it to LEVELS in {Path(__file__).name}")


def level_of(part: str) -> int:
    return next(i for i, level in enumerate(LEVELS) if part in level)


def module_name(path: Path) -> str:
    relative = path.relative_to(ROOT).with_suffix("")
    names = relative.parts[:-1] if relative.name == "__init__" else relative.parts
    return ".".join(names)


def is_module(name: str) -> bool:
    path = ROOT / name.replace(".", "/")
    return path.is_dir() or path.with_suffix(".py").exists()


def imported_modules(source: str, module: str, *, is_package: bool) -> Iterator[str]:
    """Names that a source file imports, wherever in it: also inside functions and for types only."""
    package = module if is_package else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                anchor = package.split(".")
                anchor = anchor[: len(anchor) - node.level + 1]
                base = ".".join([*anchor, *([base] if base else [])])
            for alias in node.names:
                child = f"{base}.{alias.name}"
                if base == "jaxllm" and alias.name in jaxllm._EXPORTS:
                    yield jaxllm._EXPORTS[alias.name]
                elif is_module(child):
                    yield child
                else:
                    yield base


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def violations(module: str, imports: set[str]) -> list[str]:
    """What a module of jaxllm imports from above itself."""
    part = part_of(module)
    if part is None:
        return []
    found = []
    for name in sorted(imports):
        if name.split(".")[0] != "jaxllm":
            continue
        target = part_of(name)
        if target is not None and target != part and level_of(target) <= level_of(part):
            found.append(f"{module} imports {name}, which is not below it")
    return found


@pytest.mark.parametrize("path", sources("jaxllm"), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_downwards(path: Path) -> None:
    module = module_name(path)
    imports = set(imported_modules(path.read_text(), module, is_package=path.name == "__init__.py"))
    assert violations(module, imports) == []


@pytest.mark.parametrize(
    "path", sources("sharding") + sources("pallas_kernels"), ids=lambda p: str(p.relative_to(ROOT))
)
def test_sharding_and_kernels_import_jax_only(path: Path) -> None:
    module = module_name(path)
    own = module.split(".")[0]
    imports = imported_modules(path.read_text(), module, is_package=path.name == "__init__.py")
    roots = {name.split(".")[0] for name in imports} - {own, "__future__"} - sys.stdlib_module_names
    assert roots - JAX_ONLY == set()


@pytest.mark.parametrize("package", ["jaxllm.scheduling", "jaxllm.text"])
def test_scheduling_and_text_never_name_jax(package: str) -> None:
    for path in sources(package.replace(".", "/")):
        imports = imported_modules(path.read_text(), module_name(path), is_package=path.name == "__init__.py")
        named = {name.split(".")[0] for name in imports} & {
            "jax",
            "jaxlib",
            "flax",
            "pallas_kernels",
            "sharding",
        }
        assert named == set(), path


@pytest.mark.parametrize("module", WITHOUT_JAX)
def test_importing_does_not_bring_in_jax(module: str) -> None:
    code = f"import sys, {module}\nprint(*sorted({{'jax', 'jaxlib', 'flax', 'torch'}} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [], f"import {module} brings these in"


def test_the_checker_sees_violations() -> None:
    upward = "def f():\n    from jaxllm import LLM\n"
    imports = set(imported_modules(upward, "jaxllm.scheduling.scheduler", is_package=False))
    assert violations("jaxllm.scheduling.scheduler", imports)
    typed = "if TYPE_CHECKING:\n    import jaxllm.serve\n"
    assert violations("jaxllm.llm", set(imported_modules(typed, "jaxllm.llm", is_package=False)))
    relative = "from ..execution import runner\n"
    imports = set(imported_modules(relative, "jaxllm.layers.attention", is_package=False))
    assert violations("jaxllm.layers.attention", imports)
    sideways = set(imported_modules("import jaxllm.async_engine", "jaxllm.llm", is_package=False))
    assert violations("jaxllm.llm", sideways)
    downward = "from jaxllm.errors import ConfigError\nfrom . import plan\n"
    imports = set(imported_modules(downward, "jaxllm.scheduling.scheduler", is_package=False))
    assert violations("jaxllm.scheduling.scheduler", imports) == []
    with pytest.raises(AssertionError, match="in no level"):
        part_of("jaxllm.unheard_of")
