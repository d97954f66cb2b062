"""Complete a few prompts, with sampling."""

from jaxllm import LLM, SamplingParams

prompts = [
    "Q: What is the capital of France?\nA:",
    "Q: What is 2 + 3?\nA:",
    "Once upon a time",
]
sampling_params = SamplingParams(temperature=0.8, top_p=0.95, max_tokens=24, seed=0)


def main():
    llm = LLM(model="demo", max_model_len=256, max_num_seqs=8, max_num_batched_tokens=64)
    outputs = llm.generate(prompts, sampling_params)
    for output in outputs:
        prompt = output.prompt
        generated_text = output.outputs[0].text
        print(f"Prompt: {prompt!r}, Generated text: {generated_text!r}")


if __name__ == "__main__":
    main()
