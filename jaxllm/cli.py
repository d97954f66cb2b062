"""The console script `jaxllm`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import jaxllm
from jaxllm.serve.arguments import parse_arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="jaxllm", description="LLM inference and serving in JAX.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"jaxllm {jaxllm.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    # Its own parser reads the rest, which argparse would otherwise take for its own options.
    commands.add_parser("serve", help="serve a model to OpenAI clients", add_help=False)
    given = list(sys.argv[1:] if argv is None else argv)
    arguments = parser.parse_args(given[:1])
    assert arguments.command == "serve"
    serve = parse_arguments(given[1:], program="jaxllm serve")
    # Imported late, so that --help and a mistyped flag answer at once.
    from jaxllm.serve.launcher import launch

    return launch(serve)
