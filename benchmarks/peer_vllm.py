"""vLLM as a peer of `benchmarks.compare`."""

from __future__ import annotations

from typing import Any

from benchmarks.protocol import Generate, serve


def load(options: dict[str, Any]) -> tuple[str, Generate]:
    import vllm

    llm = vllm.LLM(
        model=options["model"],
        dtype=options["dtype"],
        max_model_len=options["max_model_len"],
        max_num_seqs=options["max_num_seqs"],
        max_num_batched_tokens=options.get("max_num_batched_tokens"),
        enable_prefix_caching=True,
        gpu_memory_utilization=0.4,
        seed=0,
    )

    def generate(prompts: list[list[int]], max_tokens: int) -> int:
        params = vllm.SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        outputs = llm.generate(inputs, params, use_tqdm=False)
        return sum(len(output.outputs[0].token_ids) for output in outputs)

    return f"vLLM {vllm.__version__}", generate


if __name__ == "__main__":
    serve(load)
