"""What an answer must look like: the API's fields, checked, and made into one grammar of llguidance.

JSON is generated on one line, with at most one space after commas and colons: white space without end is how a model
fills a context. Stop strings and stop_token_ids still end an answer early; min_tokens and ignore_eos do not keep one
going that its grammar has completed.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Annotated, Literal

import orjson
from llguidance import LLMatcher
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from afd import grammar as rules
from afd.errors import RequestError
from router.answers.tools.base import Json, quoted
from router.openai.fields import read_json

MAX_CHOICES = 4096
_CHECK_S = 10.0  # longest wait for a grammar to be checked
# Their own, so that costly grammars keep nobody waiting but one another.
_CHECKING = ThreadPoolExecutor(2, "checks grammars")
_SPACING = {"whitespace_flexible": False, "item_separator": r",\x20?", "key_separator": r":\x20?"}


def _schema(value: object) -> object:
    """A JSON schema, as an object or as text."""
    if isinstance(value, str):
        try:
            value = read_json(value)
        except ValueError as error:
            raise ValueError(f"must be a JSON schema: {error}") from error
    if not isinstance(value, dict | bool):
        raise ValueError("must be a JSON schema: an object")
    return value


JsonSchema = Annotated[dict[str, object] | bool, BeforeValidator(_schema)]
Choices = Annotated[list[str], Field(fail_fast=True, min_length=1, max_length=MAX_CHOICES)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _one_unknown(cls, data: object) -> object:
        """Every unknown key is an error; the first is enough."""
        if not isinstance(data, dict) or len(data) <= len(cls.model_fields):
            return data
        known = {field.alias or name for name, field in cls.model_fields.items()}
        unknown = next(key for key in data if key not in known)
        return {key: data[key] for key in (*known, unknown) if key in data}


class _NamedSchema(_Part):
    name: str | None = None
    description: str | None = None
    schema_: JsonSchema = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(_Part):
    """OpenAI's field. `strict` is not looked at: every answer keeps to its schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: _NamedSchema | None = None


class StructuredOutputs(_Part):
    """vLLM's field. `grammar` is llguidance's Lark, where "start" is the whole answer."""

    json_: JsonSchema | None = Field(None, alias="json")
    regex: str | None = Field(None, min_length=1)
    choice: Choices | None = None
    grammar: str | None = Field(None, min_length=1)
    json_object: bool | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """The grammar of an answer, and the field of the request that it comes from."""

    grammar: Json
    param: str


class Structured(BaseModel):
    """The fields of a request that say what its answer must look like."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: JsonSchema | None = None
    guided_regex: str | None = Field(None, min_length=1)
    guided_choice: Choices | None = None
    guided_grammar: str | None = Field(None, min_length=1)

    def answer(self) -> Answer | None:
        """None: it may be anything. Raises RequestError for two fields that ask, or one that is incomplete."""
        asked = [*self._response_format(), *self._structured_outputs(), *self._guided()]
        if len(asked) > 1:
            names = " and ".join(answer.param for answer in asked)
            raise RequestError(f"{names} are both given, but an answer can have one grammar only", param=asked[1].param)
        return asked[0] if asked else None

    def _response_format(self) -> list[Answer]:
        asked = self.response_format
        if asked is None or asked.type == "text":
            return []
        if asked.type == "json_object":
            return [Answer(_json({"type": "object"}), "response_format")]
        if asked.json_schema is None:
            param = "response_format.json_schema"
            raise RequestError(f"{param} is missing", param=param, code="missing_required_parameter")
        return [Answer(_json(asked.json_schema.schema_), "response_format")]

    def _structured_outputs(self) -> list[Answer]:
        asked = self.structured_outputs
        if asked is None:
            return []
        answers = _answers("structured_outputs.", asked.json_, asked.regex, asked.choice, asked.grammar)
        if asked.json_object:
            answers.append(Answer(_json({"type": "object"}), "structured_outputs.json_object"))
        if not answers:
            message = "structured_outputs asks for nothing; give it json, regex, choice, grammar or json_object"
            raise RequestError(message, param="structured_outputs")
        return answers

    def _guided(self) -> list[Answer]:
        return _answers("guided_", self.guided_json, self.guided_regex, self.guided_choice, self.guided_grammar)


def _answers(
    prefix: str,
    schema: dict[str, object] | bool | None,
    regex: str | None,
    choice: list[str] | None,
    grammar: str | None,
) -> list[Answer]:
    answers = []
    if schema is not None:
        answers.append(Answer(_json(schema), f"{prefix}json"))
    if regex is not None:
        answers.append(Answer(_regex(regex), f"{prefix}regex"))
    if choice is not None:
        answers.append(
            Answer({"lark_grammar": f"start: CHOICE\nCHOICE: {' | '.join(map(quoted, choice))}"}, f"{prefix}choice")
        )
    if grammar is not None:
        answers.append(Answer({"lark_grammar": grammar}, f"{prefix}grammar"))
    return answers


def _json(schema: object) -> Json:
    return {"json_schema": schema}


def _regex(regex: str) -> Json:
    grammar: dict[str, object] = orjson.loads(LLMatcher.grammar_from_regex(regex))["grammars"][0]
    return {"lark_grammar": grammar["lark_grammar"]}


def compose(start: str, grammars: Mapping[str, Json]) -> str:
    """One grammar: `start` is Lark that takes the others in with @name."""
    parts = [{"lark_grammar": start}, *({"name": name, **_spaced(part)} for name, part in grammars.items())]
    try:
        return orjson.dumps({"grammars": parts}).decode()
    except TypeError as error:  # nested deeper than the library goes
        raise RequestError(f"the JSON schema cannot be followed: {error}", code="invalid_grammar") from error


def _spaced(grammar: Json) -> Json:
    schema = grammar.get("json_schema")
    if not isinstance(schema, dict):
        return grammar
    return {"json_schema": {**schema, "x-guidance": _SPACING}}


async def check(grammar: str, params: Mapping[str, str], grammars: Mapping[str, Json], whole: str) -> None:
    """Raises RequestError for the first of `grammars` that is not valid, which comes from the field that `params` has
    under its name, or for the `grammar` of which they are parts, and which comes from the field `whole`."""
    until = time.monotonic() + _CHECK_S
    too_long = f"checking it takes longer than {_CHECK_S:g} s; make it simpler"

    def find() -> tuple[str, str]:
        for name, part in [*grammars.items(), (whole, None)]:
            if time.monotonic() > until:  # nobody waits for it any more
                return whole, too_long
            text = grammar if part is None else compose(f"start: @{name}", {name: part})
            if problem := rules.problem(text):
                return whole if part is None else params[name], problem
        return "", ""

    try:
        param, problem = await asyncio.wait_for(asyncio.get_running_loop().run_in_executor(_CHECKING, find), _CHECK_S)
    except asyncio.TimeoutError:
        param, problem = whole, too_long
    if problem:
        field = param.split(":")[0]
        raise RequestError(f"{param} cannot be followed: {problem}", param=field, code="invalid_grammar")
