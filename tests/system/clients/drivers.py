"""OpenAI's two official clients behind one interface, so that one suite runs in both."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import queue
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import openai
import pytest
from pydantic import BaseModel

from afd import env

NODE = Path(__file__).with_name("node")
REQUIRED = "REQUIRE_NODE"  # .ci/run sets it: there, a missing Node is a failure
ANSWER_S = 120.0
INSTALL_S = 120.0

Body = dict[str, Any]


@dataclass(frozen=True)
class Failure:
    """What a client raised; `partial`: the chunks that came before. Names and texts are the client's own, except that
    a timeout is called as in Python."""

    error: str
    status: int | None = None
    code: str | None = None
    param: str | None = None
    message: str = ""
    request_id: str | None = None
    partial: list[Body] | None = None
    retry: str | None = None  # the header Retry-After


class Client(Protocol):
    """One official client, of one server. What it gives is plain JSON: an object, or the list of a stream's chunks.

    `what`: chat, completions (create, which streams where the body says so), chat helper (the client puts the stream
    together itself), chat parse (arguments of calls parsed), models, model.
    """

    def ask(self, what: str, body: Body, *, api_key: str = "", timeout_s: float | None = None) -> Any:
        """The answer, or a Failure."""

    def open(self, what: str, body: Body) -> Any:
        """Begins a stream, and gives its first chunk."""

    def close(self) -> None:
        """Aborts the stream that was begun last."""


class PythonClient:
    """See Client; in this process."""

    def __init__(self, url: str, api_key: str) -> None:
        self._client = openai.OpenAI(base_url=f"{url}/v1", api_key=api_key, max_retries=0, timeout=60)
        self._held: openai.Stream[Any] | None = None

    def ask(self, what: str, body: Body, *, api_key: str = "", timeout_s: float | None = None) -> Any:
        options = {"timeout": timeout_s} if timeout_s is not None else {}
        client = self._client.with_options(api_key=api_key or None, **options)
        partial: list[Body] = []
        try:
            return self._do(client, what, body, partial)
        except openai.APIError as error:
            response = getattr(error, "response", None)
            return Failure(
                type(error).__name__,
                getattr(error, "status_code", None),
                error.code,
                error.param,
                error.message,
                getattr(error, "request_id", None),
                partial,
                response.headers.get("retry-after") if response is not None else None,
            )

    def open(self, what: str, body: Body) -> Any:
        create = self._client.chat.completions.create if what == "chat" else self._client.completions.create
        self._held = create(**arguments(create, {**body, "stream": True}))
        return [plain(next(self._held))]

    def close(self) -> None:
        assert self._held is not None, "no stream was begun"
        self._held.close()

    def _do(self, client: openai.OpenAI, what: str, body: Body, partial: list[Body]) -> Any:
        chats = client.chat.completions
        match what:
            case "chat helper":
                with chats.stream(**arguments(chats.stream, body)) as stream:
                    return plain(stream.get_final_completion())
            case "chat parse":
                return plain(chats.parse(**arguments(chats.parse, body)))
            case "models":
                return [plain(model) for model in client.models.list()]
            case "model":
                return plain(client.models.retrieve(body["model"]))
        create = chats.create if what == "chat" else client.completions.create
        given = create(**arguments(create, body))
        if not isinstance(given, openai.Stream):
            return plain(given)
        for chunk in given:
            partial.append(plain(chunk))
        return partial


def arguments(method: Callable[..., Any], body: Body) -> dict[str, Any]:
    """`body` as Python's client takes it: fields that it does not know, or would keep to itself, have a place of their
    own."""
    known = inspect.signature(method).parameters.keys() - {"timeout"}
    extra = {name: value for name, value in body.items() if name not in known}
    return {name: value for name, value in body.items() if name in known} | {"extra_body": extra}


def plain(given: BaseModel) -> Body:
    return given.model_dump(mode="json", exclude_unset=True) | {"_request_id": getattr(given, "_request_id", None)}


class NodeClient:
    """See Client; a Node process with ./node/client.js."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self._lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def ask(self, what: str, body: Body, *, api_key: str = "", timeout_s: float | None = None) -> Any:
        return self._call(do="ask", what=what, body=body, options={"api_key": api_key, "timeout_s": timeout_s})

    def open(self, what: str, body: Body) -> Any:
        return self._call(do="open", what=what, body=body, options={})

    def close(self) -> None:
        self._call(do="close")

    def _call(self, **task: object) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(task) + "\n")
        self._process.stdin.flush()
        try:
            record = json.loads(self._lines.get(timeout=ANSWER_S))
        except queue.Empty:
            raise AssertionError(f"node did not answer within {ANSWER_S:g} s: {task}") from None
        if "error" not in record:
            return record["given"]
        record["error"] = record["error"].replace("APIConnectionTimeoutError", "APITimeoutError")
        return Failure(**record)

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)


@contextmanager
def python_client(url: str, api_key: str) -> Iterator[PythonClient]:
    client = PythonClient(url, api_key)
    with client._client:
        yield client


@contextmanager
def node_client(url: str, api_key: str) -> Iterator[NodeClient]:
    """Skips the test where there is no Node, and fails it where there must be one."""
    packages = installed()
    environment = {**os.environ, "NODE_PATH": str(packages), "OPENAI_BASE_URL": f"{url}/v1", "OPENAI_API_KEY": api_key}
    command = ["node", str(NODE / "client.js")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, env=environment, text=True, **pipes) as process:  # type: ignore[call-overload]
        try:
            yield NodeClient(process)
        finally:
            process.kill()


def installed() -> Path:
    """node_modules with what ./node/package-lock.json pins, in the cache: installed when it is asked for first."""
    missing = [program for program in ("node", "npm") if shutil.which(program) is None]
    if missing:
        give_up(f"there is no {' and no '.join(missing)} to run OpenAI's Node client: apt-get install nodejs npm")
    files = [NODE / "package.json", NODE / "package-lock.json"]
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]
    target = env.read().cache / "node" / digest
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            for file in files:
                shutil.copy(file, folder)
            command = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=INSTALL_S)
            if done.returncode != 0:
                give_up(f"`{' '.join(command)}` failed:\n{done.stdout}{done.stderr}")
            if not target.exists():  # another run may have been faster
                os.rename(Path(folder) / "node_modules", target)
    return target


def give_up(why: str) -> None:
    if os.environ.get(REQUIRED) == "1":
        pytest.fail(f"{why} ({REQUIRED}=1 asks for it)")
    pytest.skip(why)
