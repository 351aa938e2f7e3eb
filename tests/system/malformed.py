"""Requests that nobody should send: bodies of JSON gone wrong, and heads that are none. Seeded, so that they repeat."""

from __future__ import annotations

import copy
import json
import random
import re
import string
from typing import Any

PATHS = ("/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize")
_SCHEMA = {"type": "object", "properties": {"a": {"enum": [1, "b"]}}, "required": ["a"], "additionalProperties": False}
_FUNCTION = {"name": "f", "description": "does", "parameters": _SCHEMA}
_SHARED: dict[str, Any] = {
    "model": "tiny",
    "max_tokens": 2,
    "temperature": 0.5,
    "top_p": 0.9,
    "top_k": 5,
    "min_p": 0.1,
    "n": 1,
    "seed": 3,
    "stop": ["x", "日本"],
    "stop_token_ids": [7],
    "logit_bias": {"5": 1.5},
    "presence_penalty": 0.5,
    "bad_words": ["bad"],
    "stream": False,
    "timeout": 5.0,
    "priority": 1,
    "user": "u",
}
_BODIES: dict[str, list[dict[str, Any]]] = {
    "/v1/chat/completions": [
        _SHARED
        | {
            "messages": [
                {"role": "system", "content": "be"},
                {"role": "user", "content": [{"type": "text", "text": "é"}]},
            ]
        },
        _SHARED
        | {
            "messages": [
                {"role": "user", "content": "hi"},
                {"role": "assistant", "tool_calls": [{"id": "c", "function": {"name": "f", "arguments": '{"a": 1}'}}]},
                {"role": "tool", "tool_call_id": "c", "content": "1"},
            ],
            "tools": [{"type": "function", "function": _FUNCTION}],
            "tool_choice": "auto",
            "chat_template_kwargs": {"x": 1},
            "logprobs": True,
            "top_logprobs": 2,
        },
        _SHARED
        | {
            "messages": [{"role": "user", "content": "hi"}],
            "stream": True,
            "stream_options": {"include_usage": True},
            "response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": _SCHEMA}},
        },
    ],
    "/v1/completions": [
        _SHARED | {"prompt": "hi", "logprobs": 1, "best_of": 2},
        _SHARED | {"prompt": ["a", "b"], "echo": True, "stream": True},
        _SHARED | {"prompt": [1, 2, 3], "structured_outputs": {"regex": "[ab]{2}"}},
    ],
    "/tokenize": [{"model": "tiny", "prompt": "hi"}, {"model": "tiny", "messages": [{"role": "user", "content": "é"}]}],
    "/detokenize": [{"model": "tiny", "tokens": [1, 2, 3]}],
}
_JUNK: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 3, 2**31, 2**53 + 1, 2**63, -(2**63), 2**64, 10**400, 0.5, -0.0, 1e308, 5e-324,
    float("nan"), float("inf"), "", "a", "\0", "é" * 50, "日本", "😀", "\ud83d", "-1", "1e5", "true", "auto", "none",
    "a" * 3000, "{{ 1/0 }}", "%s%n", "<think>", "<|end|>", [], [None], [[]], [1, "a"], ["a", ["b"]], [-1], [2**40], {},
    {"": None}, {"type": "text"}, {"type": "function"}, {"a": {"b": {}}}, {"$ref": "#"}, {"regex": "(a*)*b"},
)  # fmt: skip


def body(rng: random.Random) -> tuple[str, bytes]:
    """A path and what to POST to it; a few of them are valid after all."""
    path = rng.choice(PATHS)
    value = copy.deepcopy(rng.choice(_BODIES[path]))
    kind = rng.random()
    if kind < 0.06:
        return path, _written(rng, _anything(rng, 4))
    for _ in range(rng.choice([0, 1, 1, 1, 2, 3])):
        _mutate(rng, value)
    raw = _written(rng, value)
    return path, raw if kind < 0.75 else _damaged(rng, raw)


def _mutate(rng: random.Random, value: Any) -> None:
    """Changes one thing somewhere in `value`."""
    container, parents = value, 0
    while parents < 6:
        parts = container.values() if isinstance(container, dict) else container
        inner = [part for part in parts if isinstance(part, dict | list) and part]
        if not inner or rng.random() < 0.5:
            break
        container, parents = rng.choice(inner), parents + 1
    if not container:
        return
    keys = list(container) if isinstance(container, dict) else list(range(len(container)))
    key = rng.choice(keys)
    match rng.randrange(7):
        case 0:
            del container[key]
        case 1 if isinstance(container, dict):
            container["".join(rng.choices(string.printable, k=rng.randint(0, 12)))] = _junk(rng)
        case 2:
            container[key] = [container[key]]
        case 3:
            container[key] = f"@{rng.choice([5, 100, 250, 600, 1000, 2000])}{rng.choice('[{')}@"  # see _deep
        case 4:
            container[key] = _anything(rng, 3)
        case _:
            container[key] = _junk(rng)


def _junk(rng: random.Random) -> Any:
    return copy.deepcopy(rng.choice(_JUNK))


def _anything(rng: random.Random, depth: int) -> Any:
    kind = rng.randrange(4) if depth else 3
    if kind == 0:
        return [_anything(rng, depth - 1) for _ in range(rng.randint(0, 4))]
    if kind == 1:
        return {rng.choice(["model", "prompt", "messages", "a"]): _anything(rng, depth - 1) for _ in range(3)}
    return _junk(rng)


def _deep(mark: re.Match[str]) -> str:
    """What stands for a mark like "@600[@": as many lists in one another, or objects. No encoder goes so deep."""
    depth = int(mark[1])
    return "[" * depth + "]" * depth if mark[2] == "[" else '{"properties":' * depth + "1" + "}" * depth


def _written(rng: random.Random, value: Any) -> bytes:
    """As JSON; lone surrogates and NaN as Python has them, which is not JSON's way."""
    text = re.sub(r'"@(\d+)([\[{])@"', _deep, json.dumps(value, ensure_ascii=rng.random() < 0.5))
    encoding = rng.choice(["utf-16", "utf-32-le", "utf-8-sig"]) if rng.random() < 0.02 else "utf-8"
    return text.encode(encoding, "surrogatepass")


def _damaged(rng: random.Random, raw: bytes) -> bytes:
    at = rng.randint(0, len(raw))
    match rng.randrange(8):
        case 0:
            return raw[:at]
        case 1:
            return raw[:at] + rng.randbytes(rng.randint(1, 8)) + raw[at:]
        case 2:
            return raw[:at] + rng.choice([b"\xff", b"\xc0\xaf", b"\xed\xa0\x80", b"\0", b"\xf4\x90\x80\x80"]) + raw[at:]
        case 3:
            return raw[:at] + raw[at + rng.randint(1, 20) :]
        case 4:
            return raw + raw
        case 5:
            return rng.choice([b"[", b'{"a":', b'{"prompt":[']) * rng.choice([10, 1_000, 100_000])
        case 6:
            return rng.choice([b"", b" ", b"null", b"1e999", b'"', b"[]", b"{}", b"\xef\xbb\xbf{}", b"-", b"9" * 5000])
        case _:
            return bytes(byte ^ 1 << rng.randrange(8) if rng.random() < 0.01 else byte for byte in raw)


_GET = b"GET /health HTTP/1.1\r\nhost: x\r\n"
_POST = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n"
_HEADS: tuple[bytes, ...] = (
    b"\r\n" * 50,
    b"\0" * 100,
    b"GET\r\n\r\n",
    b"GET / HTTP/9.9\r\n\r\n",
    b"get / http/1.1\r\n\r\n",
    b"GET  /health  HTTP/1.1\r\n\r\n",
    b"GET /\xff\xfe\xc3 HTTP/1.1\r\nhost: x\r\n\r\n",
    b"GET /%ff%00%zz/../../etc HTTP/1.1\r\nhost: x\r\n\r\n",
    b"GET http://elsewhere:99999/health HTTP/1.1\r\n\r\n",
    b"GET //[::1 HTTP/1.1\r\nhost: x\r\n\r\n",
    b"GET /v1/models/%2e%2e%2f\xc3\xa9 HTTP/1.1\r\nhost: x\r\n\r\n",
    b"GET /debug/timeline?seconds=nan&max_events=1e99 HTTP/1.1\r\nhost: x\r\n\r\n",
    b"GET /status/pipeline?seconds=-1&since=%00 HTTP/1.1\r\nhost: x\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"CONNECT x:1 HTTP/1.1\r\nhost: x\r\n\r\n",
    b"OPTIONS * HTTP/1.1\r\nhost: x\r\n\r\n",
    b"TRACE / HTTP/1.1\r\nhost: x\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(256)),
    b"A" * 70_000,
    b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n",
    _GET + b"no colon here\r\n\r\n",
    _GET + b": empty name\r\n\r\n",
    _GET + b"a: \0\r\n\r\n",
    _GET + b" folded: yes\r\n\r\n",
    _GET + b"a: " + b"\xff" * 200 + b"\r\n\r\n",
    _GET + b"x-request-id: \xff\xfe\r\ntraceparent: 00-zz-zz-zz\r\n\r\n",
    _GET + b"authorization: Bearer \xff\x80\r\norigin: \xff\r\n\r\n",
    _GET + b"upgrade: websocket\r\nconnection: upgrade\r\nsec-websocket-key: x\r\n\r\n",
    _GET + b"upgrade: h2c\r\nconnection: upgrade, http2-settings\r\nhttp2-settings: AAMAAABk\r\n\r\n",
    _GET + b"a: b\r\n" * 5_000 + b"\r\n",
    _GET + b"a: " + b"b" * 100_000 + b"\r\n\r\n",
    _GET + b"connection: close\r\n\r\n" + _GET + b"\r\n",
    _GET + b"\r\n" + _GET + b"\r\n" + b"rubbish",
    _POST + b"content-length: -1\r\n\r\n{}",
    _POST + b"content-length: 0x10\r\n\r\n{}",
    _POST + b"content-length: 99999999999999999999999\r\n\r\n{}",
    _POST + b"content-length: 9223372036854775807\r\n\r\n{}",
    _POST + b"content-length: 99999999999\r\n\r\n{}",
    _POST + b"content-length: 2\r\ncontent-length: 3\r\n\r\n{}",
    _POST + b"content-length: 2\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    _POST + b"content-length: 100\r\n\r\n{}",
    _POST + b"expect: 100-continue\r\ncontent-length: 2\r\n\r\n{}",
    _POST + b"transfer-encoding: chunked\r\n\r\nZZ\r\n{}\r\n0\r\n\r\n",
    _POST + b"transfer-encoding: chunked\r\n\r\nffffffffffffffffff\r\n{}\r\n",
    _POST + b"transfer-encoding: chunked\r\n\r\n-1\r\n{}\r\n0\r\n\r\n",
    _POST + b"transfer-encoding: chunked\r\n\r\n2;" + b"x" * 5_000 + b"\r\n{}\r\n0\r\n\r\n",
    _POST + b"transfer-encoding: chunked\r\n\r\n2\r\n{}garbage\r\n0\r\n\r\n",
    _POST + b"transfer-encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\ntrailer: x\r\n\r\n",
    _POST + b"transfer-encoding: gzip\r\n\r\n{}",
    _POST + b"x-request-timeout: 1e999\r\ncontent-length: 2\r\n\r\n{}",
    _POST + b"content-type: text/plain; charset=\xff\r\ncontent-length: 2\r\n\r\n{}",
)


def head(rng: random.Random) -> bytes:
    """What to begin a connection with."""
    raw = rng.choice(_HEADS)
    if rng.random() < 0.4:
        return raw
    at = rng.randint(0, len(raw))
    match rng.randrange(3):
        case 0:
            return raw[:at]
        case 1:
            return raw[:at] + rng.randbytes(rng.randint(1, 6)) + raw[at:]
        case _:
            return raw[:at] + raw[at + rng.randint(1, 6) :]
