"""Prompts as token ids, and per-prompt parameters."""

from jaxllm import LLM, SamplingParams, TokensPrompt


def main():
    llm = LLM(model="demo", max_model_len=256, max_num_seqs=8, max_num_batched_tokens=64)
    tokenizer = llm.get_tokenizer()
    text = "Q: What is the capital of France?\nA:"
    token_ids = tokenizer.encode(text)

    params = [SamplingParams(temperature=0.0, max_tokens=m) for m in (4, 4, 2)]
    outputs = llm.generate(
        [TokensPrompt(prompt_token_ids=token_ids), {"prompt": text}, token_ids], params, use_tqdm=False
    )
    for output in outputs:
        print(output.prompt, len(output.outputs[0].token_ids), output.outputs[0].text)
    print("same:", outputs[0].outputs[0].token_ids == outputs[1].outputs[0].token_ids)


if __name__ == "__main__":
    main()
