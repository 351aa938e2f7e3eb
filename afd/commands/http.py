"""Requests to a running router, with its refusals and silences as errors of ours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx

from afd import env
from afd.errors import RequestError, Unavailable

CONNECT_S = 5.0
SILENCE_S = 300.0  # longest wait for the next byte: a prompt may queue behind others


@contextmanager
def client(url: str, silence_s: float = SILENCE_S, api_key: str | None = None) -> Iterator[httpx.Client]:
    """A client for the server at `url`. `api_key`: "" sends none; None, for routers of ours alone, is the first of
    AFD_API_KEYS. Inside, httpx errors become Unavailable."""
    timeout = httpx.Timeout(silence_s, connect=CONNECT_S)
    key = next(iter(env.read().api_keys), "") if api_key is None else api_key
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        with httpx.Client(base_url=url, timeout=timeout, headers=headers) as session:
            yield session
    except httpx.ConnectError as error:
        raise Unavailable(f"nothing answers at {url}; start `afd serve`, or say where with --url") from error
    except httpx.TimeoutException as error:
        raise Unavailable(f"{url} did not answer within {silence_s:g} s") from error
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise Unavailable(f"{url}: {error}") from error


def check(response: httpx.Response) -> httpx.Response:
    """The response if it is a success; else raises RequestError with the router's own sentence."""
    if response.is_success:
        return response
    response.read()
    try:
        sentence = str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        sentence = response.text.strip()[:200] or response.reason_phrase
    raise RequestError(f"{sentence} (HTTP {response.status_code})", status=response.status_code)


def foreign(url: str) -> Unavailable:
    """The error for an answer that no router of ours gives."""
    return Unavailable(f"{url} answers, but not as `afd serve` does; say with --url where the router listens")


def fetch(session: httpx.Client, path: str) -> dict[str, Any]:
    """The JSON object at `path`. Raises RequestError for a refusal, Unavailable for anything else."""
    response = check(session.get(path))
    try:
        value = response.json()
    except ValueError as error:
        raise foreign(str(session.base_url)) from error
    if not isinstance(value, dict):
        raise foreign(str(session.base_url))
    return value
