"""Find the most probable continuations instead of sampling one."""

from jaxllm import LLM
from jaxllm.sampling_params import BeamSearchParams


def main():
    llm = LLM(model="demo", max_model_len=256, max_num_seqs=8, max_num_batched_tokens=64, max_logprobs=20)
    params = BeamSearchParams(beam_width=4, max_tokens=12)
    outputs = llm.beam_search([{"prompt": "The capital of France is"}], params)
    for sequence in outputs[0].sequences:
        print(f"{sequence.cum_logprob:.3f} {sequence.text!r}")


if __name__ == "__main__":
    main()
