"""An engine that slept says what it said before."""

from __future__ import annotations

import gc
from pathlib import Path

import jax
import pytest

from jaxllm import LLM, SamplingParams
from jaxllm.errors import InvalidRequestError
from tests.models.checkpoints import llama_tensors, write_model

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]


def live_bytes() -> int:
    gc.collect()
    return sum(array.nbytes for array in jax.live_arrays())


def test_memory_is_given_back_and_answers_stay(tmp_path: Path) -> None:
    path = write_model(tmp_path, llama_tensors())
    greedy = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, detokenize=False)
    settings = {
        "max_num_seqs": 2,
        "max_num_batched_tokens": 16,
        "num_gpu_blocks_override": 40,
        "block_size": 4,
    }
    before = live_bytes()
    with LLM(path, skip_tokenizer_init=True, disable_log_stats=True, **settings) as llm:  # type: ignore[arg-type]

        def answer() -> tuple[list[int], int | None]:
            (output,) = llm.generate([PROMPT], greedy, use_tqdm=False)
            return output.outputs[0].token_ids, output.num_cached_tokens

        expected, _ = answer()
        assert answer() == (expected, 8)
        awake = live_bytes()
        tensors = sum(tensor.nbytes for tensor in llama_tensors().values())
        cache = 2 * 41 * 4 * 4 * 6 * 4
        for level in (1, 2):
            llm.sleep(level)
            assert live_bytes() <= awake - tensors - cache
            llm.sleep(level)  # sleeps already
            with pytest.raises(InvalidRequestError, match="asleep"):
                llm.generate([PROMPT], greedy, use_tqdm=False)
            with pytest.raises(InvalidRequestError, match="weights and kv_cache"):
                llm.wake_up(["wieghts"])
            assert not llm.wake_up(["weights"])
            assert llm.wake_up(["kv_cache"])
            assert llm.wake_up()
            assert answer() == (expected, 0)  # Nothing is taken for cached that is not there.
            assert live_bytes() <= awake
        # A token that ends the output is known when the next step has been launched, and nobody waits for it.
        ended = SamplingParams(temperature=0, max_tokens=8, stop_token_ids=[expected[2]], detokenize=False)
        llm.generate([PROMPT], ended, use_tqdm=False)
        llm.sleep()
        assert llm.wake_up()
        llm.enqueue([PROMPT], greedy)
        with pytest.raises(InvalidRequestError, match="unfinished"):
            llm.sleep()
        (output,) = llm.wait_for_completion(use_tqdm=False)
        assert output.outputs[0].token_ids == expected
        with pytest.raises(InvalidRequestError, match="levels 1 and 2"):
            llm.sleep(3)
    assert live_bytes() <= before + 4096
