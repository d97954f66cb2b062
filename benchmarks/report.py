"""What every benchmark prints and writes: a table, a JSON file, a picture."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def add_output_arguments(parser: argparse.ArgumentParser, *, plot: bool = True) -> None:
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured to this file")
    if plot:
        parser.add_argument("--plot", type=Path, metavar="FILE", help="draw a picture (PNG, SVG or PDF)")


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]], note: str = "") -> None:
    """Prints rows under columns; the first column to the left, figures to the right."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", caption=note or None, caption_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left", overflow="fold")
    for row in rows:
        table.add_row(*(f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in row))
    console = Console()
    # Where the output goes to a file there is no width to keep to.
    (console if console.is_terminal else Console(width=160)).print(table)


def write_json(path: Path | None, results: object) -> None:
    """Writes dataclasses, mappings and lists of them; nothing where no path was given."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=2, default=_plain) + "\n")


def _plain(value: object) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"cannot write {type(value).__name__} as JSON")


def figure(width: float = 8.0, height: float = 4.5) -> tuple[Figure, Axes]:
    """An empty picture that needs no display."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    picture, axes = pyplot.subplots(figsize=(width, height), layout="constrained")
    axes.spines[["top", "right"]].set_visible(False)
    return picture, axes


def save(picture: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.savefig(path, dpi=150)
    print(f"picture: {path}")
