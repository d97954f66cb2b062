"""The bundled demo model: a tiny chat model, so that the first command answers and tests have real text.

It is made by `scripts/demo_model/train.py` and good for nothing but showing that the engine runs.
"""

from __future__ import annotations

from pathlib import Path

DEMO_MODEL_NAME = "jaxllm-demo"


def demo_model_path() -> Path:
    """Directory of the demo model: config, safetensors weights, tokenizer and chat template."""
    return Path(__file__).parent
