"""Write the demo model as a directory that any loader of Hugging Face models reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from corpus import CHAT_TEMPLATE, END_OF_TEXT, SPECIAL_TOKENS, TOOL_TOKENS, TURN_END
from network import Parameters, Shape, checkpoint_tensors
from safetensors.numpy import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

README = """# jaxllm-demo

**A demo, not a useful model.** About two million parameters, trained in about an hour on a CPU by
`scripts/demo_model/train.py`, on questions and answers that `scripts/demo_model/corpus.py` makes: about
jaxllm, small sums, capitals, JSON answers, tool calls, very short stories.
These weights come from a training that was resumed several times while the shares of the text were still
being changed: running the script again gives a similar model, not these very weights.
It is weak at counting, at lists of a given length and at subtraction; `evaluate.py` says how weak.
jaxllm serves it when no model is named, so that the first command answers, and its tests run on it.
Whatever lies outside that text it does not know.

Llama architecture, byte-level BPE with {vocab_size} tokens, a context of {context} tokens, ChatML turns,
tool calls as `<tool_call>{{"name": ..., "arguments": ...}}</tool_call>`. Apache-2.0, as jaxllm itself.

For real work pass a real model: `python -m jaxllm.serve MODEL`.
"""


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE: every byte is a token, so any UTF-8 text encodes; digits stand alone."""
    tokenizer = Tokenizer(models.BPE())
    words = Regex(r"\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[*SPECIAL_TOKENS, *TOOL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=5,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    # Visible in the output, unlike the special tokens: a parser of tool calls reads them.
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in TOOL_TOKENS])
    return tokenizer


def write_model(directory: Path, parameters: Parameters, shape: Shape, tokenizer: Tokenizer) -> None:
    """Write weights (bfloat16), tokenizer, chat template, configuration and README."""
    directory.mkdir(parents=True, exist_ok=True)
    end, turn_end = tokenizer.token_to_id(END_OF_TEXT), tokenizer.token_to_id(TURN_END)
    tensors = {
        name: value.astype(ml_dtypes.bfloat16) for name, value in checkpoint_tensors(parameters).items()
    }
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "model.safetensors").chmod(0o644)
    tokenizer.save(str(directory / "tokenizer.json"))
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_hidden_layers,
        "num_attention_heads": shape.num_attention_heads,
        "num_key_value_heads": shape.num_key_value_heads,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": shape.rms_norm_eps,
        "rope_theta": shape.rope_theta,
        "max_position_embeddings": shape.max_position_embeddings,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": None,
        "eos_token_id": [turn_end, end],
        "pad_token_id": end,
        "torch_dtype": "bfloat16",
    }
    _write_json(directory / "config.json", config)
    _write_json(
        directory / "generation_config.json",
        {
            "eos_token_id": [turn_end, end],
            "pad_token_id": end,
            "do_sample": True,
            "temperature": 0.6,
            "top_p": 0.95,
        },
    )
    _write_json(
        directory / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": None,
            "eos_token": TURN_END,
            "pad_token": END_OF_TEXT,
            "add_bos_token": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": shape.max_position_embeddings,
            "chat_template": CHAT_TEMPLATE,
        },
    )
    readme = README.format(vocab_size=shape.vocab_size, context=shape.max_position_embeddings)
    (directory / "README.md").write_text(readme)


def read_parameters(directory: Path, like: Parameters) -> Parameters:
    """The written weights in the layout of `network.py`, as float32."""
    from safetensors.numpy import load_file

    tensors = {
        name: value.astype(np.float32) for name, value in load_file(directory / "model.safetensors").items()
    }
    names = checkpoint_tensors(like)
    assert tensors.keys() == names.keys()
    layers = []
    for index in range(len(like["layers"])):
        prefix = f"model.layers.{index}."
        layers.append(
            {
                "input_norm": tensors[prefix + "input_layernorm.weight"],
                "post_norm": tensors[prefix + "post_attention_layernorm.weight"],
                **{part: tensors[f"{prefix}self_attn.{part}_proj.weight"].T for part in "qkvo"},
                **{part: tensors[f"{prefix}mlp.{part}_proj.weight"].T for part in ("gate", "up", "down")},
            }
        )
    return {
        "embedding": tensors["model.embed_tokens.weight"],
        "layers": layers,
        "final_norm": tensors["model.norm.weight"],
    }


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
