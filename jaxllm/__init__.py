"""jaxllm: LLM inference and serving in JAX, on GPU, TPU and CPU."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # "X as X" marks an export for type checkers
    from jaxllm.inputs import TextPrompt as TextPrompt
    from jaxllm.inputs import TokensPrompt as TokensPrompt
    from jaxllm.llm import LLM as LLM
    from jaxllm.outputs import CompletionOutput as CompletionOutput
    from jaxllm.outputs import RequestOutput as RequestOutput
    from jaxllm.pooling_outputs import ClassificationRequestOutput as ClassificationRequestOutput
    from jaxllm.pooling_outputs import EmbeddingRequestOutput as EmbeddingRequestOutput
    from jaxllm.pooling_outputs import PoolingRequestOutput as PoolingRequestOutput
    from jaxllm.pooling_outputs import ScoringRequestOutput as ScoringRequestOutput
    from jaxllm.pooling_params import PoolingParams as PoolingParams
    from jaxllm.request import SchedulingTerms as SchedulingTerms
    from jaxllm.sampling_params import BeamSearchParams as BeamSearchParams
    from jaxllm.sampling_params import RequestOutputKind as RequestOutputKind
    from jaxllm.sampling_params import SamplingParams as SamplingParams
    from jaxllm.structured_outputs import StructuredOutputsParams as StructuredOutputsParams

__version__ = "0.1.0"

# Name -> module. Resolved on first use, so that `import jaxllm.scheduling` does not import JAX.
_EXPORTS = {
    "LLM": "jaxllm.llm",
    "SamplingParams": "jaxllm.sampling_params",
    "BeamSearchParams": "jaxllm.sampling_params",
    "RequestOutputKind": "jaxllm.sampling_params",
    "StructuredOutputsParams": "jaxllm.structured_outputs",
    "SchedulingTerms": "jaxllm.request",
    "RequestOutput": "jaxllm.outputs",
    "CompletionOutput": "jaxllm.outputs",
    "PoolingParams": "jaxllm.pooling_params",
    "PoolingRequestOutput": "jaxllm.pooling_outputs",
    "EmbeddingRequestOutput": "jaxllm.pooling_outputs",
    "ClassificationRequestOutput": "jaxllm.pooling_outputs",
    "ScoringRequestOutput": "jaxllm.pooling_outputs",
    "TextPrompt": "jaxllm.inputs",
    "TokensPrompt": "jaxllm.inputs",
}

__all__ = [*_EXPORTS, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'jaxllm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
