"""`python -m jaxllm.serve` is `jaxllm serve`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from jaxllm.serve.arguments import parse_arguments


def main(argv: Sequence[str] | None = None, program: str = "python -m jaxllm.serve") -> int:
    """Serve until told to stop; returns the exit status."""
    arguments = parse_arguments(sys.argv[1:] if argv is None else argv, program=program)
    # Imported late, so that --help and a mistyped flag answer at once.
    from jaxllm.serve.launcher import launch

    return launch(arguments)


if __name__ == "__main__":
    sys.exit(main())
