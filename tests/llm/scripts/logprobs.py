"""How probable the model finds its own tokens, and those of the prompt."""

from jaxllm import LLM, SamplingParams


def main():
    llm = LLM(model="demo", max_model_len=256, max_num_seqs=8, max_num_batched_tokens=64)
    params = SamplingParams(temperature=0.0, max_tokens=4, logprobs=3, prompt_logprobs=0)
    output = llm.generate("Q: What is the capital of France?\nA:", params)[0]

    print("prompt:", len(output.prompt_logprobs), len(output.prompt_token_ids), output.prompt_logprobs[0])
    for token_id, position in zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True):
        entry = position[token_id]
        print(f"prompt {entry.decoded_token!r} {entry.logprob:.3f} rank {entry.rank}")

    completion = output.outputs[0]
    for token_id, position in zip(completion.token_ids, completion.logprobs, strict=True):
        best = max(position, key=lambda i: position[i].logprob)
        print(f"output {len(position)} {position[token_id].rank} {best == token_id}")
    print(f"total {completion.cumulative_logprob:.3f}")


if __name__ == "__main__":
    main()
