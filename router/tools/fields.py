"""Tools, calls and choices of them, as the OpenAI API writes them in requests."""

from __future__ import annotations

import re
from typing import Annotated, Literal

import orjson
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

MAX_TOOLS = 128
_NAME = re.compile(r"[a-zA-Z0-9_.-]{1,64}")


def _name(value: str) -> str:
    if not _NAME.fullmatch(value):
        raise ValueError("must be 1 to 64 of the characters a-z, A-Z, 0-9, _, . and -")
    return value


def _object_as_text(value: object) -> object:
    """Arguments as models read and write them: a JSON object, which the API keeps as text."""
    if isinstance(value, str):
        try:
            value = orjson.loads(value or "{}")
        except orjson.JSONDecodeError as error:
            raise ValueError(f"must be a JSON object: {error}") from error
    if not isinstance(value, dict):
        raise ValueError("must be a JSON object, as a string")
    return value


class _Part(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)


class Function(_Part):
    """`parameters` is a JSON schema; None: the function takes none. `strict` is not looked at: a forced call keeps to
    the schema, others to what the model makes of it."""

    name: Annotated[str, AfterValidator(_name)]
    description: str | None = None
    parameters: dict[str, object] | None = None

    @property
    def schema_of_arguments(self) -> dict[str, object]:
        """`parameters`, or what says that there are none."""
        return self.parameters or {"type": "object", "properties": {}, "additionalProperties": False}


class Tool(_Part):
    type: Literal["function"]
    function: Function

    def for_model(self) -> dict[str, object]:
        """As templates show it to models."""
        return self.model_dump(exclude_none=True)


class _FunctionName(_Part):
    name: str


class NamedTool(_Part):
    type: Literal["function"]
    function: _FunctionName


class _CalledFunction(_Part):
    name: str
    arguments: Annotated[dict[str, object], BeforeValidator(_object_as_text)]


class ToolCall(_Part):
    """A call in the conversation so far."""

    id: str = ""
    type: Literal["function"] = "function"
    function: _CalledFunction


def _choice(value: object) -> object:
    if isinstance(value, str) and value not in ("none", "auto", "required"):
        raise ValueError('must be "none", "auto", "required", or {"type": "function", "function": {"name": …}}')
    return value


Tools = Annotated[list[Tool], Field(max_length=MAX_TOOLS)]
ToolChoice = Annotated[Literal["none", "auto", "required"] | NamedTool, BeforeValidator(_choice)]
