"""Chat templates: messages to prompt text, as Hugging Face's chat_template renders them, in Jinja's sandbox."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from datetime import datetime
from types import MappingProxyType
from typing import NoReturn

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from afd.errors import CheckpointError, RequestError

_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class ChatTemplate:
    """The chat template of one model, as RouterSettings.tokenizer_config has it. Rendering is pure and may happen on
    any thread. `knows_tools`: it says something of `tools`."""

    def __init__(self, tokenizer_config: Mapping[str, object]) -> None:
        """Raises CheckpointError for a template that is not text or not valid Jinja."""
        self._tokenizer_config = tokenizer_config
        source = tokenizer_config.get("chat_template")
        if source is not None and not isinstance(source, str):
            raise CheckpointError(f"chat_template in tokenizer_config is a {type(source).__name__}, not text")
        try:
            environment = _environment()
            self._template = None if source is None else environment.from_string(source)
            self.knows_tools = source is not None and "tools" in jinja2.meta.find_undeclared_variables(
                environment.parse(source)
            )
        except jinja2.TemplateSyntaxError as error:
            raise CheckpointError(
                f"the model's chat_template is damaged: line {error.lineno}: {error.message}"
            ) from error
        self._special_tokens = {
            name: text for name in _SPECIAL_TOKENS if isinstance(text := tokenizer_config.get(name), str)
        }

    def render(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, object]] | None = None,
        variables: Mapping[str, object] = MappingProxyType({}),
    ) -> str:
        """Prompt text; with `add_generation_prompt`, up to where the assistant's answer begins. `variables` are the
        template's own, such as enable_thinking, and replace any of ours but the messages.

        Raises RequestError (param "messages").
        """
        if self._template is None:
            message = "this model has no chat template; send the whole prompt to /v1/completions instead"
            raise RequestError(message, param="messages", code="no_chat_template")
        try:
            context = {"tools": tools, "documents": None, "add_generation_prompt": add_generation_prompt}
            return self._template.render({**context, **self._special_tokens, **variables, "messages": messages})
        except Exception as error:  # the template is the model's own code: it may fail in any way
            message = f"the model's chat template cannot render these messages: {error}"
            raise RequestError(message, param="messages", code="chat_template_error") from error

    def render_open(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        tools: Sequence[Mapping[str, object]] | None = None,
        variables: Mapping[str, object] = MappingProxyType({}),
    ) -> str:
        """Prompt text up to the end of the last message's content, where the answer goes on. Raises RequestError."""
        *before, last = messages
        mark = f"\x02{uuid.uuid4().hex}"
        marked = [*before, {**last, "content": f"{last['content']}{mark}"}]
        text, found, _ = self.render(marked, add_generation_prompt=False, tools=tools, variables=variables).rpartition(
            mark
        )
        if not found:
            message = "the model's chat template does not show the end of the last message, so it cannot be continued"
            raise RequestError(message, param="continue_final_message", code="chat_template_error")
        return text

    def with_source(self, source: str) -> ChatTemplate:
        """The same model with another template. Raises RequestError for one that is not valid Jinja."""
        try:
            return ChatTemplate({**self._tokenizer_config, "chat_template": source})
        except CheckpointError as error:
            message = str(error).replace("the model's chat_template", "chat_template")
            raise RequestError(message, param="chat_template", code="chat_template_error") from error


def _environment() -> jinja2.Environment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own tojson escapes for HTML, which no model has learned."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


class _GenerationBlock(jinja2.ext.Extension):
    """{% generation %}…{% endgeneration %} marks the assistant's words for training; for serving it is its content."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)
