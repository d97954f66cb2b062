"""What every body that the server takes has in common, and how one is refused."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from jaxllm.errors import InvalidRequestError, UnsupportedError


class Body(BaseModel):
    """A body whose unknown fields and wrong types are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())


class Refusal(Exception):
    """Carries an error of ours through pydantic, which would wrap a ValueError in words of its own.

    Attributes:
        error: what the client is to be told.
    """

    def __init__(self, error: InvalidRequestError | UnsupportedError) -> None:
        super().__init__(str(error))
        self.error = error


def refusal(message: str, param: str) -> Refusal:
    """The exception that refuses a field from inside a validator."""
    return Refusal(InvalidRequestError(message, param=param))
