"""A model directory through the public API, in the form the expected values have."""

from __future__ import annotations

from pathlib import Path

from tests.parity.checkpoints import NUM_GREEDY_TOKENS


def run(directory: Path, prompt: list[int], *, max_num_batched_tokens: int) -> tuple[list[float], list[int]]:
    """Logprob of each prompt token but the first, and the greedy continuation.

    Args:
        max_num_batched_tokens: a prompt longer than this is computed in chunks. Few tokens and one
            sequence at a time make few shapes to compile, which is what these tests wait for.
    """
    from jaxllm import LLM, SamplingParams

    llm = LLM(
        model=str(directory),
        skip_tokenizer_init=True,
        dtype="float32",
        max_model_len=len(prompt) + NUM_GREEDY_TOKENS,
        max_num_seqs=1,
        max_num_batched_tokens=max_num_batched_tokens,
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
