"""Several questions about one long text: the text is computed once."""

from jaxllm import LLM, SamplingParams

prefix = (
    "Below are questions that a teacher asks in class, each followed by the short answer that a pupil gives. "
    "The answers are correct, and they are never longer than one sentence.\n\n"
)
prompts = [
    "Q: What is the capital of France?\nA:",
    "Q: What is the capital of Japan?\nA:",
    "Q: What is 4 + 4?\nA:",
]
generating_prompts = [prefix + prompt for prompt in prompts]
sampling_params = SamplingParams(temperature=0.0, max_tokens=12)


def main():
    regular_llm = LLM(
        model="demo",
        max_model_len=256,
        max_num_seqs=8,
        max_num_batched_tokens=64,
        enable_prefix_caching=False,
    )
    outputs = regular_llm.generate(generating_prompts, sampling_params)
    regular_texts = [output.outputs[0].text for output in outputs]
    print("cached without:", [output.num_cached_tokens for output in outputs])
    del regular_llm

    prefix_cached_llm = LLM(
        model="demo", max_model_len=256, max_num_seqs=8, max_num_batched_tokens=64, enable_prefix_caching=True
    )
    # The first request fills the cache.
    prefix_cached_llm.generate(generating_prompts[0], sampling_params)
    outputs = prefix_cached_llm.generate(generating_prompts, sampling_params)
    cached_texts = [output.outputs[0].text for output in outputs]
    print("cached with:", [output.num_cached_tokens for output in outputs])
    print("same:", regular_texts == cached_texts)

    print("reset:", prefix_cached_llm.reset_prefix_cache())
    outputs = prefix_cached_llm.generate(generating_prompts[0], sampling_params)
    print("cached after reset:", outputs[0].num_cached_tokens)


if __name__ == "__main__":
    main()
