"""Messages and tools as a chat template takes them. Where it knows no tools, they become text, in the words of the
model's own format: tools in the system message, calls in the assistant's, results in the user's."""

from __future__ import annotations

from collections.abc import Sequence

from router.answers.tools.base import Json, ToolFormat
from router.openai.schema import ChatPrompt, Message


def messages(request: ChatPrompt, tools: ToolFormat, *, template_knows_tools: bool) -> list[Json]:
    """The conversation for the template."""
    if template_knows_tools:
        return [message.for_template() for message in request.messages]
    written = [_as_text(message, tools) for message in request.messages]
    offered = request.offered_tools
    return _with_system(written, tools.describe(offered)) if offered else written


def _as_text(message: Message, tools: ToolFormat) -> Json:
    """One message without the fields that only templates with tools know."""
    if message.role == "tool":
        return {"role": "user", "content": tools.result_text(message.content)}
    fields = message.for_template()
    fields.pop("tool_calls", None)
    if not message.tool_calls:
        return fields
    calls = [tools.call_text(call.function.name, call.function.arguments) for call in message.tool_calls]
    return fields | {"content": "\n".join([message.content, *calls] if message.content else calls)}


def _with_system(written: Sequence[Json], text: str) -> list[Json]:
    """`written` with `text` at the end of its system message, which is the first one."""
    if written and written[0].get("role") == "system":
        return [{**written[0], "content": f"{written[0]['content']}\n\n{text}"}, *written[1:]]
    return [{"role": "system", "content": text}, *written]
