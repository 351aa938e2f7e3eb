"""`afd chat`: one question, or a conversation, with answers printed as they come."""

from __future__ import annotations

import json
import readline  # noqa: F401 (gives input() line editing and history)
import sys
from collections.abc import Iterator

import httpx

from afd.commands.http import check, client, fetch, foreign
from afd.errors import AfdError, Unavailable

Message = dict[str, str]


def chat(prompt: str | None, url: str, temperature: float) -> None:
    """Asks `prompt` and returns; without one, talks until end of input. Raises RequestError, Unavailable."""
    with client(url) as session:
        try:
            model = str(fetch(session, "/v1/models")["data"][0]["id"])
        except (KeyError, IndexError, TypeError) as error:
            raise foreign(url) from error
        if prompt is not None:
            _answer(session, model, temperature, [{"role": "user", "content": prompt}])
        else:
            _converse(session, model, temperature)


def _converse(session: httpx.Client, model: str, temperature: float) -> None:
    """The history is what was said; a question that failed or was interrupted is taken back."""
    print(f"talking to {model}; Ctrl-C interrupts an answer, Ctrl-D ends", file=sys.stderr)
    history: list[Message] = []
    while (line := _ask()) is not None:
        if not line.strip():
            continue
        history.append({"role": "user", "content": line})
        try:
            history.append({"role": "assistant", "content": _answer(session, model, temperature, history)})
        except KeyboardInterrupt:
            print()
            history.pop()
        except AfdError as error:
            print(f"error: {error}", file=sys.stderr)
            history.pop()


def _ask() -> str | None:
    """The next line; None at the end of input, or at Ctrl-C on the prompt."""
    try:
        return input("> ")
    except (EOFError, KeyboardInterrupt):
        print()
        return None


def _answer(session: httpx.Client, model: str, temperature: float, messages: list[Message]) -> str:
    """Prints the answer as it streams in, and returns it."""
    text = ""
    body = {"model": model, "messages": messages, "temperature": temperature, "stream": True}
    with session.stream("POST", "/v1/chat/completions", json=body) as response:
        for piece in _pieces(check(response)):
            print(piece, end="", flush=True)
            text += piece
    print()
    return text


def _pieces(response: httpx.Response) -> Iterator[str]:
    """The text in each server-sent event. Raises Unavailable for an error event, or a stream that just stops."""
    for line in response.iter_lines():
        if not line.startswith("data:"):
            continue
        data = line.removeprefix("data:").strip()
        if data == "[DONE]":
            return
        try:
            event = json.loads(data)
            problem = event["error"]["message"] if "error" in event else ""
            texts = [] if problem else [str(choice["delta"].get("content") or "") for choice in event["choices"]]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise foreign(str(response.url)) from error
        if problem:
            raise Unavailable(str(problem))
        yield from texts
    raise Unavailable("the server ended the answer in the middle")
