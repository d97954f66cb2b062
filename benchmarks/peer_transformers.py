"""Hugging Face transformers with torch as a peer of `benchmarks.compare`."""

from __future__ import annotations

from typing import Any

from benchmarks.protocol import Generate, serve


def load(options: dict[str, Any]) -> tuple[str, Generate]:
    import torch
    import transformers

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, options["dtype"])
    model = transformers.AutoModelForCausalLM.from_pretrained(options["model"], dtype=dtype).to(device)
    model.eval()

    def generate(prompts: list[list[int]], max_tokens: int) -> int:
        ids = torch.tensor(prompts, device=device)
        with torch.inference_mode():
            outputs = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                min_new_tokens=max_tokens,
                max_new_tokens=max_tokens,
                pad_token_id=0,
            )
        return int(outputs[:, ids.shape[1] :].numel())

    return f"transformers {transformers.__version__}", generate


if __name__ == "__main__":
    serve(load)
