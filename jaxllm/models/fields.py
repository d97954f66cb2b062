"""Reading a Hugging Face `config.json` so that nothing in it is overlooked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxllm.errors import ConfigError, UnsupportedModelError

# Fields that change nothing about the forward pass: training, bookkeeping, generation defaults
# (which are read from generation_config.json), and what tools leave behind.
_HARMLESS = frozenset(
    {
        "_name_or_path",
        "architectures",
        "model_type",
        "transformers_version",
        "auto_map",
        "tokenizer_class",
        "torch_dtype",
        "dtype",
        "use_bfloat16",
        "use_cache",
        "tf_legacy_loss",
        "torchscript",
        "return_dict",
        "output_hidden_states",
        "output_attentions",
        "output_scores",
        "return_dict_in_generate",
        "chunk_size_feed_forward",
        "gradient_checkpointing",
        "initializer_range",
        "initializer_factor",
        "init_std",
        "attention_dropout",
        "activation_dropout",
        "hidden_dropout",
        "dropout",
        "layerdrop",
        "router_aux_loss_coef",
        "aux_loss_alpha",
        "seq_aux",
        "ep_size",
        "router_jitter_noise",
        "output_router_logits",
        "resid_pdrop",
        "embd_pdrop",
        "attn_pdrop",
        "classifier_dropout",
        "embedding_dropout",
        "resid_dropout",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "unk_token_id",
        "sep_token_id",
        "cls_token_id",
        "mask_token_id",
        "decoder_start_token_id",
        "prefix",
        "max_length",
        "min_length",
        "max_new_tokens",
        "do_sample",
        "early_stopping",
        "num_beams",
        "num_beam_groups",
        "diversity_penalty",
        "temperature",
        "top_k",
        "top_p",
        "typical_p",
        "repetition_penalty",
        "length_penalty",
        "no_repeat_ngram_size",
        "encoder_no_repeat_ngram_size",
        "bad_words_ids",
        "num_return_sequences",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "remove_invalid_values",
        "exponential_decay_length_penalty",
        "suppress_tokens",
        "begin_suppress_tokens",
        "finetuning_task",
        "id2label",
        "label2id",
        "num_labels",
        "problem_type",
        "task_specific_params",
        "summary_type",
        "summary_use_proj",
        "summary_activation",
        "summary_proj_to_labels",
        "summary_first_dropout",
        "reorder_and_upcast_attn",
        "n_ctx",
        "max_sequence_length",
        "is_llama_config",
        "transformers.js_config",
        "unsloth_version",
        "unsloth_fixed",
    }
)

# Fields that may stand in any config and are served at this one value only.
_REQUIRED_VALUES: Mapping[str, Any] = {
    "is_encoder_decoder": False,
    "is_decoder": (False, True),
    "is_causal": True,
    "add_cross_attention": False,
    "pretraining_tp": (1, 0),
    "partial_rotary_factor": 1.0,
    "rope_interleaved": False,
}


class ConfigFields:
    """The fields of one `config.json`; every one must be read, known as harmless, or it is refused.

    Values are typed when read: a wrong one is a `ConfigError` with the field's name.
    """

    def __init__(self, values: Mapping[str, Any], architecture: str) -> None:
        self.architecture = architecture
        self._values = values
        self._read: set[str] = set()

    def get(self, name: str) -> Any:
        """The raw value; None where it is absent or null."""
        self._read.add(name)
        return self._values.get(name)

    def integer(self, name: str, *, minimum: int = 1) -> int:
        """A field that must be there."""
        value = self.optional_integer(name, minimum=minimum)
        if value is None:
            raise ConfigError(
                f"config.json of this {self.architecture} lacks {name!r}, an integer of at least {minimum}; "
                f"add it there or give hf_overrides={{{name!r}: ...}}",
                param=name,
            )
        return value

    def optional_integer(self, name: str, *, minimum: int = 1) -> int | None:
        value = self.get(name)
        if value is None:
            return None
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise self.wrong(name, value, f"an integer of at least {minimum}")
        return value

    def number(self, name: str, default: float, *, minimum: float = 0.0) -> float:
        value = self.get(name)
        return default if value is None else as_number(self, name, value, minimum=minimum)

    def boolean(self, name: str, default: bool) -> bool:
        value = self.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.wrong(name, value, "true or false")
        return value

    def choice(self, name: str, allowed: Mapping[str, Any], default: str) -> Any:
        """What a string field stands for in `allowed`."""
        value = self.get(name)
        value = default if value is None else value
        if not isinstance(value, str) or value not in allowed:
            raise UnsupportedModelError(
                f"config.json has {name}={value!r}, which {self.architecture} is not served with; "
                f"supported: {', '.join(allowed)}"
            )
        return allowed[value]

    def require(self, name: str, *allowed: Any) -> None:
        """Refuses any value of an optional field but these."""
        value = self.get(name)
        if value is not None and value not in allowed:
            raise UnsupportedModelError(
                f"config.json has {name}={value!r}, which {self.architecture} is not served with; "
                f"supported: {', '.join(map(repr, allowed))}"
            )

    def wrong(self, name: str, value: Any, expected: str) -> ConfigError:
        return ConfigError(
            f"config.json has {name}={value!r}; it must be {expected}. Mend the file or give "
            f"hf_overrides={{{name!r}: ...}}",
            param=name,
        )

    def finish(self) -> None:
        """Refuses every field that nobody has read and that may change the computation.

        Null, false and empty values count as a feature that is switched off.

        Raises:
            UnsupportedModelError: with the names and values of all such fields.
        """
        if self._values.get("quantization_config"):
            method = self._values["quantization_config"]
            method = method.get("quant_method", method) if isinstance(method, Mapping) else method
            raise UnsupportedModelError(
                f"config.json has quantization_config (method {method!r}): quantized checkpoints are not "
                "served; use the original, unquantized one, or a conversion of it to bfloat16 where what was "
                "published is quantized (DeepSeek-V3)"
            )
        for name, allowed in _REQUIRED_VALUES.items():
            if name not in self._read:
                self.require(name, *(allowed if isinstance(allowed, tuple) else (allowed,)))
        unknown = {
            name: value
            for name, value in self._values.items()
            if name not in self._read
            and name not in _HARMLESS
            and not name.startswith("_")
            and not (value is None or value is False or value in ("", [], {}))
        }
        if unknown:
            fields = ", ".join(f"{name}={_short(value)}" for name, value in sorted(unknown.items()))
            override = ", ".join(f"{name!r}: None" for name in sorted(unknown))
            raise UnsupportedModelError(
                f"config.json of this {self.architecture} has fields that are not understood here and may "
                f"change what the model computes: {fields}. If they do not, give hf_overrides={{{override}}}"
            )


def as_number(fields: ConfigFields, name: str, value: Any, *, minimum: float = 0.0) -> float:
    """A finite number of at least `minimum`, or a `ConfigError` that names the field."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not minimum <= value < float("inf"):
        raise fields.wrong(name, value, f"a number of at least {minimum:g}")
    return float(value)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
