"""The engine under measurement: which model it runs, and with what arguments."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.shapes import SHAPES, write_model_directory

if TYPE_CHECKING:
    from jaxllm import LLM


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Which model, or which shape with dummy weights, and the engine arguments that bear on speed."""
    which = parser.add_mutually_exclusive_group()
    which.add_argument("model", nargs="?", help="directory or hub name")
    which.add_argument("--shape", choices=sorted(SHAPES), help="a public shape with random weights")
    parser.add_argument("--dtype", help='default: float32 on CPU, else the model\'s own ("auto")')
    parser.add_argument("--max-num-batched-tokens", type=int)
    parser.add_argument("--compilation-cache-dir")
    parser.add_argument("--no-async-scheduling", dest="async_scheduling", action="store_false")
    parser.add_argument("--seed", type=int, default=0)


@contextmanager
def model_arguments(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Keyword arguments of `LLM` for the parsed options; a shape's files exist while the context lasts."""
    arguments: dict[str, Any] = {
        "dtype": options.dtype or "auto",
        "seed": options.seed,
        "async_scheduling": options.async_scheduling,
    }
    for name in ("max_num_batched_tokens", "compilation_cache_dir"):
        if getattr(options, name) is not None:
            arguments[name] = getattr(options, name)
    with tempfile.TemporaryDirectory(prefix="jaxllm-benchmark-") as scratch:
        if options.shape:
            directory = write_model_directory(SHAPES[options.shape], Path(scratch) / options.shape)
            arguments |= {"model": str(directory), "load_format": "dummy"}
        else:
            arguments["model"] = options.model or "demo"
        yield arguments


def model_name(options: argparse.Namespace) -> str:
    return str(options.shape or options.model or "demo")


def wait_until_compiled(llm: LLM) -> None:
    """Waits for the shapes that compile in the background, so that none of it falls into what is measured."""
    llm.llm_engine.runner.compiler.wait_for_all()


def generate(llm: LLM, prompts: list[list[int]], max_tokens: int) -> list[Any]:
    """Greedy, of a fixed length, whatever the model would rather say."""
    from jaxllm import SamplingParams, TokensPrompt

    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    outputs = llm.generate(
        [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts], params, use_tqdm=False
    )
    counts = {len(output.outputs[0].token_ids) for output in outputs}
    if counts != {max_tokens}:
        raise RuntimeError(f"asked for {max_tokens} tokens a prompt, got {sorted(counts)}")
    return outputs
