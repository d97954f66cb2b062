"""Every exception that a user of jaxllm can meet.

A message says what was wrong, with the value, what is allowed, and what to do about it.
All of them derive from `JaxLLMError`; each also derives from the built-in exception that a
caller would expect (`ValueError` for a bad value, ...), so that code written for another
engine keeps working.
"""

from __future__ import annotations


class JaxLLMError(Exception):
    """Base class of every error that jaxllm raises on purpose."""


class InvalidRequestError(JaxLLMError, ValueError):
    """A request that cannot be served as it stands: a bad field, an empty or over-long prompt.

    Attributes:
        param: name of the offending field, or None where the request as a whole is wrong.
    """

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class ConfigError(JaxLLMError, ValueError):
    """An engine argument that is out of range, unknown, or contradicts another one.

    Attributes:
        param: name of the offending argument, or None.
    """

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class UnsupportedError(JaxLLMError, NotImplementedError):
    """Something that exists elsewhere, is understood, and is not served here (yet).

    Attributes:
        param: name of the field or argument that asks for it, or None.
    """

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class UnsupportedModelError(UnsupportedError, ValueError):
    """A model whose architecture, or a feature of it, no decoder here computes."""


class ModelNotFoundError(JaxLLMError, FileNotFoundError):
    """No model at the path or under the hub name that was given."""


class CheckpointError(JaxLLMError, ValueError):
    """Weights that are missing, unknown, duplicated, misshapen, truncated or corrupt."""


class InsufficientMemoryError(JaxLLMError, MemoryError):
    """The weights, or a KV cache for even one sequence, do not fit in the memory allowed."""


class EngineDeadError(JaxLLMError, RuntimeError):
    """The engine stopped after an error; it takes no more requests."""


class HostError(EngineDeadError):
    """A host that shares the model never came, is gone, hangs, or has fallen out of step."""


class RecompilationError(JaxLLMError, RuntimeError):
    """The step was compiled after warm-up while `forbid_recompile` was set."""
