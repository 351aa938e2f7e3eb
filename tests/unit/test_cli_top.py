"""`afd top`: what it makes of two answers, and how it takes a server that comes and goes."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from afd import cli
from afd.commands.frame import Latency, frame, quantile
from afd.pipeline import summary
from afd.pipeline.analysis import picture
from tests.unit.pipeline.recordings import one_layer

Reply = tuple[int, str]


def answer(at_s: float = 10.0, tokens: int = 100, **changes: Any) -> dict[str, Any]:
    """As GET /status/pipeline of 1A1F gives it."""
    status = {"running": 3, "waiting": 1, "waiting_tokens": 50, "blocks_used": 25, "blocks_total": 100}
    latency = {"bounds_s": [0.1, 0.2, None], "counts": [0, tokens, tokens]}
    attention = {"role": "attention", "rank": 0, "state": "ready", "pid": 7, "message": ""}
    return {
        "at_s": at_s,
        "epoch": 1,
        "model": "tiny",
        "topology": "1A1F",
        "problem": "",
        "workers": [
            attention | {"status": status | {"generated_tokens": tokens}},
            attention | {"role": "ffn", "pid": 8, "status": {"calls": 2 * tokens, "dispatches": 2 * tokens}},
        ],
        "counted": {
            "generated_tokens": tokens,
            "time_to_first_token": latency | {"counts": [5, 5, 5]},
            "inter_token_latency": latency,
            "expert_calls": tokens,
            "expert_tokens": 3 * tokens,
        },
        "timeline": summary.as_json(picture(one_layer(), asked_s=5.0)),
        "timeline_problem": "",
        "lanes": None,
    } | changes


def test_rates_and_latencies_are_of_the_time_between_the_answers_and_shares_of_the_timelines() -> None:
    shown = frame(answer(), answer(12.0, 180))
    attention, ffn = shown.rows
    assert (attention.name, attention.running, attention.waiting, attention.kv_share) == ("attention 0", 3, 1, 0.25)
    assert (attention.tokens_per_s, attention.calls_per_s) == (40.0, None)
    assert (ffn.name, ffn.calls_per_s, ffn.tokens_per_s, ffn.kv_share) == ("FFN 0", 80.0, None, None)
    assert (shown.tokens_per_s, shown.tokens_per_expert_call, shown.waiting_tokens) == (40.0, 3.0, 50)
    assert (attention.busy, ffn.busy) == (pytest.approx(0.31), pytest.approx(0.25))
    assert [side.role for side in shown.sides] == ["attention", "ffn"]
    assert all(side.busy + sum(side.bubbles.values()) == pytest.approx(1.0) for side in shown.sides)
    assert shown.first_token == Latency(None, None), "no request began meanwhile"
    assert (shown.inter_token.p50, shown.inter_token.p95) == (pytest.approx(0.15), pytest.approx(0.195))


def test_a_worker_that_was_started_again_and_another_run_begin_anew() -> None:
    again = answer(12.0, 30)
    again["workers"][0]["pid"] = 99
    assert frame(answer(), again).rows[0].tokens_per_s == 0.0
    assert frame(answer(), answer(12.0, 180, epoch=2)).tokens_per_s is None


def test_a_lost_worker_and_missing_timelines_are_told_once() -> None:
    lost = answer(problem="ffn_rank 0 is gone", timeline=None, timeline_problem="ffn_rank 0 is gone")
    lost["workers"][1] |= {"state": "lost", "message": "ffn_rank 0 is gone", "status": None}
    shown = frame(answer(), lost)
    assert shown.problems == ("ffn_rank 0 is gone",)
    assert (shown.rows[1].state, shown.rows[1].busy, shown.sides) == ("lost", None, ())


def test_quantiles_are_straight_between_bounds_and_end_at_the_last() -> None:
    before = {"bounds_s": [0.1, 0.2, None], "counts": [3, 3, 3]}
    now = {"bounds_s": [0.1, 0.2, None], "counts": [3, 7, 13]}
    assert quantile(before, now, 0.2) == pytest.approx(0.15)
    assert quantile(before, now, 0.95) == pytest.approx(0.2)
    assert quantile(before, {**now, "counts": [13, 13, 13]}, 0.5) == pytest.approx(0.05)
    assert quantile(before, before, 0.5) is None


def test_an_answer_without_any_figure_still_gives_a_frame() -> None:
    shown = frame(answer(workers=[], timeline=None), answer(workers=[], timeline=None))
    assert (shown.rows, shown.tokens_per_s, shown.efficiency) == ((), None, None)


class Server:
    """Answers /status/pipeline with `reply`, which a test may change."""

    def __init__(self) -> None:
        self.reply: Callable[[], Reply] = lambda: (200, json.dumps(answer()))
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                status, body = outer.reply() if self.path == "/status/pipeline" else (404, "{}")
                self.send_response(status)
                self.send_header("Content-Length", str(len(body.encode())))
                self.end_headers()
                self.wfile.write(body.encode())

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()


def top(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["afd", "top", *arguments])
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def test_once_prints_one_frame_that_fits_80_columns(
    server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = iter([answer(10.0, 100), answer(11.0, 1300)])
    server.reply = lambda: (200, json.dumps(next(answers)))
    assert top(monkeypatch, "--once", "--interval", "0.6", "--url", server.url) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    (attention,) = [line.split() for line in out.splitlines() if line.startswith("attention 0")]
    assert attention[2:3] == ["ready"]
    assert attention[-3:] == ["3", "1", "1200"]
    for text in ("tiny as 1A1F", "31 %", "25 %", "p50 150.0 ms, p95 195.0 ms", "waits: no work 25 %, ffn 20 %"):
        assert text in " ".join(out.split())


@pytest.mark.parametrize("body", ["hello", "[]", "{}", '{"epoch": 1, "workers": 5}'])
def test_a_server_that_is_none_of_ours_is_one_sentence(
    server: Server, body: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server.reply = lambda: (200, body)
    assert top(monkeypatch, "--once", "--url", server.url) == 2
    assert "answers, but not as `afd serve` does" in capsys.readouterr().err


def test_what_cannot_be_done_is_one_sentence(
    server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, sentence in (
        (("--url", "http://127.0.0.1:1", "--once"), "nothing answers at http://127.0.0.1:1"),
        (("--url", server.url, "--interval", "0"), "--interval is 0 s; it must be at least 0.6 s"),
        (("--url", server.url), "--once prints one frame"),
    ):
        assert top(monkeypatch, *arguments) == 2
        assert sentence in capsys.readouterr().err


class Terminal:
    """`afd top` on a terminal of 80 columns; what it drew so far is `text`."""

    def __init__(self, url: str) -> None:
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 80, 0, 0))
        env = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")} | {"TERM": "xterm"}
        command = [sys.executable, "-c", "from afd.cli import main; main()", "top", "--interval", "0.6", "--url", url]
        self.process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, env=env)
        os.close(slave)
        self.text = ""
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        try:
            while chunk := os.read(self.master, 1 << 16):
                self.text += chunk.decode(errors="replace")
        except OSError:  # the other end is closed
            pass

    def until(self, text: str, seconds: float = 60.0) -> None:
        """Waits for `text` to be drawn from now on."""
        begun, deadline = len(self.text), time.monotonic() + seconds
        while text not in self.text[begun:]:
            assert time.monotonic() < deadline, f"{text!r} did not come within {seconds:g} s:\n{self.text[begun:]}"
            threading.Event().wait(0.02)


def test_a_server_that_goes_away_is_waited_for_until_ctrl_c(server: Server) -> None:
    terminal = Terminal(server.url)
    try:
        terminal.until("attention 0")
        server.reply = lambda: (503, json.dumps({"error": {"message": "this server is shutting down"}}))
        terminal.until("this server is shutting down (HTTP 503); what is below is old, trying again")
        terminal.until("attention 0")
        server.reply = lambda: (200, json.dumps(answer(20.0, epoch=2, model="another")))
        terminal.until("another as 1A1F")
        terminal.process.send_signal(signal.SIGINT)
        assert terminal.process.wait(timeout=30) == 0
    finally:
        terminal.process.kill()
        terminal.process.wait()
        os.close(terminal.master)
