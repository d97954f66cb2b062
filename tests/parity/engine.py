"""A model directory through the public API, in the form the expected values have."""

from __future__ import annotations

from pathlib import Path

from tests.parity.checkpoints import NUM_GREEDY_TOKENS


def run(directory: Path, prompt: list[int], *, chunk: int = 0) -> tuple[list[float], list[int]]:
    """Logprob of each prompt token but the first, and the greedy continuation.

    Few tokens and one sequence at a time make few shapes to compile, which is what these tests wait for; with
    chunks or without, these are the same, so that a second lane finds what the first one compiled.

    Args:
        chunk: a prompt longer than this is computed in chunks; 0 is at once, as far as a step takes it.
    """
    from jaxllm import LLM, SamplingParams

    llm = LLM(
        model=str(directory),
        skip_tokenizer_init=True,
        dtype="float32",
        max_model_len=len(prompt) + NUM_GREEDY_TOKENS,
        max_num_seqs=1,
        max_num_batched_tokens=64,
        long_prefill_token_threshold=chunk,
        kv_cache_memory_bytes=8 << 20,
    )
    params = SamplingParams(
        temperature=0.0,
        max_tokens=NUM_GREEDY_TOKENS,
        ignore_eos=True,
        prompt_logprobs=0,
        detokenize=False,
    )
    [output] = llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
    llm.shutdown()
    assert output.prompt_logprobs is not None and output.prompt_logprobs[0] is None
    logprobs = [
        entry[token].logprob for entry, token in zip(output.prompt_logprobs[1:], prompt[1:], strict=True)
    ]
    return logprobs, list(output.outputs[0].token_ids)
