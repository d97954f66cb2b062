"""Talk to the model: one conversation, and then several at once."""

from jaxllm import LLM, SamplingParams


def main():
    llm = LLM(model="demo", max_model_len=256, max_num_seqs=8, max_num_batched_tokens=64)
    sampling_params = SamplingParams(temperature=0.0, max_tokens=32)

    conversation = [
        {"role": "user", "content": "What is the capital of France?"},
        {"role": "assistant", "content": "Paris."},
        {"role": "user", "content": "What is the capital of Italy?"},
    ]
    outputs = llm.chat(conversation, sampling_params, use_tqdm=False)
    print("one:", outputs[0].outputs[0].text)

    conversations = [
        [{"role": "user", "content": f"What is the capital of {country}?"}]
        for country in ("France", "Italy", "Japan")
    ]
    for output in llm.chat(messages=conversations, sampling_params=sampling_params, use_tqdm=True):
        print("several:", output.outputs[0].text)


if __name__ == "__main__":
    main()
