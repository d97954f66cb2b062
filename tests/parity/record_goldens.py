"""Records what Hugging Face computes for every case: `python -m tests.parity.record_goldens [NAME ...]`.

Needs torch. The weights are not recorded: every machine makes them from the seed.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers

from tests.parity import hugging_face
from tests.parity.cases import CASES, Case
from tests.parity.checkpoints import NUM_GREEDY_TOKENS, make_prompt, write_checkpoint

GOLDENS = Path(__file__).parent / "goldens"
# A greedy token counts only where no rounding can turn it, and a text only where it varies.
_LEAST_LEAD = 3e-3
_LEAST_DISTINCT = 8
_SEEDS = range(200)


def record(case: Case) -> dict[str, Any]:
    """A seed whose model has clear greedy choices, and what Hugging Face computes with it."""
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        shapes = hugging_face.tensor_shapes(case.config, scratch / "shapes")
        for seed in _SEEDS:
            model = hugging_face.load(write_checkpoint(scratch / str(seed), case.config, shapes, seed))
            prompt = make_prompt(case.prompt_length, case.config["vocab_size"], seed)
            # First, since dynamic rope scaling in Hugging Face remembers the longest sequence it has seen.
            logprobs = hugging_face.prompt_logprobs(model, prompt)
            tokens, lead = hugging_face.greedy(model, prompt, NUM_GREEDY_TOKENS)
            if lead >= _LEAST_LEAD and len(set(tokens)) >= _LEAST_DISTINCT:
                break
        else:
            raise SystemExit("no seed gives a text that varies and has clear choices")
        return {
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
            "config": dict(case.config),
            "seed": seed,
            "shapes": {name: list(shape) for name, shape in shapes.items()},
            "prompt": prompt,
            "prompt_logprobs": [round(value, 6) for value in logprobs],
            "greedy": tokens,
        }


def main(names: list[str]) -> None:
    GOLDENS.mkdir(exist_ok=True)
    for name in names or CASES:
        golden = record(CASES[name])
        lines = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in golden.items()]
        (GOLDENS / f"{name}.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")
        print(f"{name}: seed {golden['seed']}, {len(set(golden['greedy']))} distinct tokens")


if __name__ == "__main__":
    main(sys.argv[1:])
