"""Several completions of one prompt."""

from jaxllm import LLM, SamplingParams


def main():
    llm = LLM(model="demo", max_model_len=256, max_num_seqs=8, max_num_batched_tokens=64)
    sampling_params = SamplingParams(n=4, temperature=1.0, top_p=0.95, seed=1234, max_tokens=16)
    first = llm.generate("Once upon a time", sampling_params)[0]
    for completion in first.outputs:
        print(f"{completion.index}: {completion.text!r} ({completion.finish_reason})")

    again = llm.generate("Once upon a time", sampling_params)[0]
    print("reproducible:", [c.text for c in first.outputs] == [c.text for c in again.outputs])


if __name__ == "__main__":
    main()
