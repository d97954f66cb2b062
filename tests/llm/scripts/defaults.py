"""The sampling parameters that the model's makers recommend, and changes to them."""

from jaxllm import LLM, SamplingParams


def main():
    llm = LLM(model="demo", max_model_len=256, max_num_seqs=8, max_num_batched_tokens=64)
    params = llm.get_default_sampling_params()
    print("defaults:", params.temperature, params.top_p)
    params.max_tokens = 5
    params.seed = 3
    print("one:", len(llm.generate("Q: What is 2 + 3?\nA:", params)[0].outputs[0].token_ids) <= 5)

    ids = llm.enqueue(["Once upon a time", "The"], SamplingParams(max_tokens=3, ignore_eos=True))
    outputs = llm.wait_for_completion()
    print("enqueued:", [output.request_id for output in outputs] == ids)
    print("tokens:", sum(len(output.outputs[0].token_ids) for output in outputs))


if __name__ == "__main__":
    main()
