"""`afd trace` against a server that answers as ours does, and against others."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from afd import cli
from afd.pipeline import perfetto, summary
from afd.pipeline.analysis import picture
from tests.unit.pipeline.recordings import one_layer

PICTURE = picture(one_layer(), asked_s=5.0)
TRACE, SUMMARY = json.dumps(perfetto.document(PICTURE)), json.dumps(summary.as_json(PICTURE))

Serve = Callable[[Callable[[str], tuple[int, str]]], str]
Monkey = pytest.MonkeyPatch
Capture = pytest.CaptureFixture[str]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """A server that answers each path as it is told; its URL."""
    servers: list[ThreadingHTTPServer] = []

    def start(answer: Callable[[str], tuple[int, str]]) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                status, body = answer(self.path)
                self.send_response(status)
                self.send_header("Content-Length", str(len(body.encode())))
                self.end_headers()
                self.wfile.write(body.encode())

            def log_message(self, format: str, *args: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def ours(path: str) -> tuple[int, str]:
    return 200, SUMMARY if "format=summary" in path else TRACE


def afd(monkeypatch: Monkey, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["afd", *arguments])
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def test_the_trace_is_written_as_the_server_sent_it(
    serve: Serve, tmp_path: Path, monkeypatch: Monkey, capsys: Capture
) -> None:
    file = tmp_path / "t.json"
    assert afd(monkeypatch, "trace", "--url", serve(ours), "--seconds", "5", "-o", str(file)) == 0
    assert file.read_text() == TRACE
    out = capsys.readouterr().out
    assert "ui.perfetto.dev" in out
    assert "the workers' rings reach back 0.00 s of the 5 s asked for" in out


def test_the_summary_says_who_is_busy_who_waits_and_why(serve: Serve, monkeypatch: Monkey, capsys: Capture) -> None:
    url = serve(ours)
    assert afd(monkeypatch, "trace", "--summary", "--url", url) == 0
    out = capsys.readouterr().out
    for text in (
        *("attention_rank 0", "31.0 %", "wait 44.0 %", "ffn 20.0 %", "wire back 10.0 %", "no work 25.0 %"),
        *("pipeline efficiency", "the larger of: attention 31.0 %, ffn 25.0 %"),
        *("tokens per expert call", "5.0", "tokens per FFN call", "10.0, from 1.0 dispatches", "150 there and back"),
    ):
        assert text in out
    assert afd(monkeypatch, "trace", "--summary", "--json", "--url", url) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(SUMMARY)


def test_a_refusal_is_told_in_the_routers_words(serve: Serve, monkeypatch: Monkey, capsys: Capture) -> None:
    url = serve(lambda _: (400, json.dumps({"error": {"message": "seconds is '99'"}})))
    for more in ([], ["--summary"]):
        assert afd(monkeypatch, "trace", "--url", url, "--seconds", "99", *more) == 2
        assert capsys.readouterr().err == "error: seconds is '99' (HTTP 400)\n"


@pytest.mark.parametrize("more", [[], ["--summary"], ["--summary", "--json"]])
@pytest.mark.parametrize("reply", ["hello", "[]", "{}", '{"otherData": 3, "window_s": 1, "workers": 5}'])
def test_a_server_that_is_none_of_ours_is_one_sentence(
    serve: Serve, reply: str, more: list[str], tmp_path: Path, monkeypatch: Monkey, capsys: Capture
) -> None:
    file = tmp_path / "t.json"
    assert afd(monkeypatch, "trace", "--url", serve(lambda _: (200, reply)), "-o", str(file), *more) == 2
    out, err = capsys.readouterr()
    assert "answers, but not as `afd serve` does" in err
    assert (out, err.count("\n"), file.exists()) == ("", 1, False)


def test_a_file_that_cannot_be_written_is_named(
    serve: Serve, tmp_path: Path, monkeypatch: Monkey, capsys: Capture
) -> None:
    assert afd(monkeypatch, "trace", "--url", serve(ours), "-o", str(tmp_path / "no" / "t.json")) == 2
    assert "(-o): No such file or directory" in capsys.readouterr().err


def test_nobody_there_is_one_sentence(monkeypatch: Monkey, capsys: Capture) -> None:
    assert afd(monkeypatch, "trace", "--url", "http://127.0.0.1:1") == 2
    assert "nothing answers at http://127.0.0.1:1" in capsys.readouterr().err
