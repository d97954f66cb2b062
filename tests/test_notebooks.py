"""The notebooks as they are committed; that they run is a stage of `.ci/run`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def test_they_are_there() -> None:
    names = {path.stem for path in NOTEBOOKS}
    assert names >= {"quickstart", "one_request", "paged_attention", "scheduling_policies", "sharding"}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_small_whole_and_worth_opening(path: Path) -> None:
    assert path.stat().st_size < 300_000
    notebook: dict[str, Any] = json.loads(path.read_text())
    first, *cells = notebook["cells"]
    text = "".join(first["source"])
    assert first["cell_type"] == "markdown"
    assert text.startswith("# ")
    assert "You will see" in text
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1)), "run it from the top"
    outputs = [output for cell in code for output in cell["outputs"]]
    assert not [o for o in outputs if o["output_type"] == "error" or o.get("name") == "stderr"]
    assert sum("image/png" in o.get("data", {}) for o in outputs) >= 3
    assert not re.search(r"/(home|root|opt|tmp|usr)/", json.dumps([o.get("text", "") for o in outputs]))
