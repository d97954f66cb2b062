"""Preempted requests whose pages go to the host and back, on devices that have a part of every page each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxllm import SamplingParams
from jaxllm.models.families import translate_config
from tests.parallel.eight_devices.same_tokens import LENGTHS, OUTPUT, make_llm, use_one_shape
from tests.parallel.models import Oracle, hf_config, write_model


def test_pages_come_back_to_the_devices_they_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two KV heads on four devices, so that each page's part is also that of another device."""
    use_one_shape(monkeypatch)
    directory = write_model(tmp_path, "llama")
    oracle = Oracle(directory, translate_config(hf_config("llama")))
    prompts = [np.random.default_rng(n).integers(601, size=n).tolist() for n in LENGTHS]
    common: dict[str, Any] = {"temperature": 0, "max_tokens": OUTPUT, "ignore_eos": True, "detokenize": False}
    # Nothing is found in the prefix cache, so that what comes back is all that there is.
    llm = make_llm(directory, 4, swap_space=0.001, enable_prefix_caching=False)
    try:
        outputs = llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts], SamplingParams(**common), use_tqdm=False
        )
        for prompt, output in zip(prompts, outputs, strict=True):
            assert list(output.outputs[0].token_ids) == oracle.greedy(prompt, OUTPUT)
        scheduler = llm.llm_engine.scheduler
        assert scheduler.num_preemptions == scheduler.num_swaps > 0
        scheduler.check_integrity()
    finally:
        llm.shutdown()
