"""The console script `jaxllm`."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

import jaxllm

# What each command is, and the module whose `main(argv, program)` runs it.
COMMANDS = {
    "serve": ("serve a model to OpenAI clients", "jaxllm.serve.__main__"),
    "chat": ("chat with the model of a running server", "jaxllm.chat"),
    "complete": ("complete texts with the model of a running server", "jaxllm.complete"),
    "simulate": ("serve simulated traffic under scheduling policies, and compare", "jaxllm.simulate"),
    "replay": ("look at a schedule that a server recorded", "jaxllm.replay.__main__"),
    "run-batch": ("answer a file of requests in OpenAI's batch format", "jaxllm.run_batch"),
    "plan": ("what each device would hold of a model", "jaxllm.plan"),
    "collect-env": ("describe this machine for a report of a problem", "jaxllm.collect_env"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="jaxllm", description="LLM inference and serving in JAX.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"jaxllm {jaxllm.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (description, _) in COMMANDS.items():
        # Its own parser reads the rest, which argparse would otherwise take for its own options.
        commands.add_parser(name, help=description, add_help=False)
    given = list(sys.argv[1:] if argv is None else argv)
    command = parser.parse_args(given[:1]).command
    # Imported late, so that --help and a mistyped command answer at once.
    module = importlib.import_module(COMMANDS[command][1])
    status: int = module.main(given[1:], program=f"jaxllm {command}")
    return status
