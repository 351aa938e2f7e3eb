"""Tools, calls and choices of them, as the OpenAI API writes them in requests."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from afd.errors import RequestError
from router.openai.fields import read_json, shown

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
            value = read_json(value or "{}")
        except ValueError as error:
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


Tools = Annotated[list[Tool], Field(fail_fast=True, max_length=MAX_TOOLS)]
ToolChoice = Annotated[Literal["none", "auto", "required"] | NamedTool, BeforeValidator(_choice)]


class ToolFields(BaseModel):
    """The fields of a chat request that are about tools."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)

    tools: Tools | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None

    @property
    def offered_tools(self) -> list[Tool]:
        """Those that the model is told of."""
        return [] if self.tool_choice == "none" else self.tools or []

    @property
    def named_tool(self) -> str | None:
        """The one function that must be called, if the client says which."""
        return self.tool_choice.function.name if isinstance(self.tool_choice, NamedTool) else None

    @property
    def must_call(self) -> bool:
        """Whether the answer has to be a call."""
        return self.tool_choice == "required" or self.named_tool is not None

    def check_choice(self) -> None:
        """Raises RequestError for a tool_choice that does not fit the tools."""
        names = [tool.function.name for tool in self.tools or []]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise RequestError(f"tools holds two functions named {twice!r}", param="tools")
        if self.must_call and not names:
            raise RequestError("tool_choice asks for a call, but tools is empty", param="tool_choice")
        if self.named_tool is not None and self.named_tool not in names:
            raise RequestError(
                f"tool_choice names the function {shown(self.named_tool)}, but tools has {', '.join(names)}",
                param="tool_choice",
            )
