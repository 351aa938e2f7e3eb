"""The status page as a person has it, in headless Chromium, and `afd top`, both on a whole server."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from router.http.page import Page
from tests import tiny
from tests.system import chromium
from tests.system.serving import AFD, Serving, serving, until

WORKERS = ("attention 0", "ffn 0", "ffn 1")
GENERATED = "Number(document.getElementById('generated').textContent.replaceAll(',', ''))"
# Whether the lanes have more colours than those of their ground, the axis and the text.
PAINTED = """((lanes) => {
    const { data } = lanes.getContext("2d").getImageData(0, 0, lanes.width, lanes.height);
    return new Set(new Uint32Array(data.buffer)).size > 3;
})(document.getElementById("strip"))"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    chromium.executable()  # before a server is started for nothing
    return tiny.write(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[Serving]:
    with serve(model) as running:
        yield running


@pytest.fixture
def page() -> Iterator[chromium.Page]:
    with chromium.page() as page:
        yield page


def serve(model: Path, *arguments: str) -> AbstractContextManager[Serving]:
    return serving(model, *arguments, "--backend", "local", "--topology", "1A2F", "--dtype", "fp32")


def generate(server: Serving, max_tokens: int) -> None:
    body = {"model": "tiny", "prompt": [1, 2, 3], "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
    assert httpx.post(f"{server.url}/v1/completions", json=body, timeout=120.0).status_code == 200


@contextmanager
def load(server: Serving) -> Iterator[None]:
    """Two streams, one request after the other each, until the block ends."""
    over = threading.Event()

    def run() -> None:
        while not over.is_set():
            generate(server, 100)

    clients = [threading.Thread(target=run) for _ in range(2)]
    for client in clients:
        client.start()
    try:
        yield
    finally:
        over.set()
        for client in clients:
            client.join()


def card(worker: str, selector: str = "") -> str:
    """JavaScript for a worker's card, or what is in it."""
    return f"document.querySelector('[data-worker=\"{worker}\"] {selector}')"


def generated(server: Serving) -> int:
    return int(server.worker("attention")["status"]["generated_tokens"])


@pytest.mark.chromium
def test_the_page_shows_what_the_server_does_and_asks_nobody_else(server: Serving, page: chromium.Page) -> None:
    page.open(server.url)
    page.until(f"document.querySelectorAll('[data-worker]').length === {len(WORKERS)}")
    assert {page.value(f"{card(name, '.statename')}.textContent") for name in WORKERS} == {"ready"}
    assert {f"pid {w['pid']}" for w in server.status()["workers"]} == {
        page.value(f"{card(name, '.pid')}.textContent") for name in WORKERS
    }
    assert page.value("document.getElementById('state').textContent") == "serving"
    before = generated(server)
    generate(server, 50)
    page.until(f"{GENERATED} === {before + 50}")
    with load(server):
        page.until(f"{GENERATED} > {before + 150}")
        page.until("Number(document.getElementById('running').textContent) > 0")
        page.until("parseFloat(document.getElementById('rate').textContent.replaceAll(',', '')) > 0")
        page.until("parseFloat(document.getElementById('itl50').textContent) > 0")
        page.until(f"parseFloat({card('ffn 1', '.meter b')}.textContent) > 0")
        page.until("document.querySelectorAll('#microbatches li').length > 1")
        page.until(PAINTED)
        page.until("document.querySelectorAll('#bubbles .fill').length >= 4")
        once = subprocess.run([AFD, "top", "--once", "--url", server.url], capture_output=True, text=True, timeout=60)
    assert once.returncode == 0, once.stderr
    for text in ("tiny as 1A2F", "attention 0", "FFN 1", "ready", "pipeline efficiency"):
        assert text in once.stdout
    page.until(f"{GENERATED} === {generated(server)}")
    assert page.console == []
    hosts = {urlsplit(url).netloc for url in page.requested if not url.startswith("data:")}
    assert hosts == {urlsplit(server.url).netloc}


@pytest.mark.chromium
def test_the_page_asks_only_while_it_is_looked_at(server: Serving, page: chromium.Page) -> None:
    def asked() -> int:
        return sum(url.endswith("/status/pipeline") for url in page.requested)

    def hide(hidden: bool) -> None:
        """As if the tab was behind another one."""
        page.value(f"Object.defineProperty(document, 'hidden', {{configurable: true, value: {str(hidden).lower()}}})")
        page.value("document.dispatchEvent(new Event('visibilitychange'))")

    page.open(server.url)
    until(lambda: asked() >= 2)
    hide(True)
    page.value("new Promise((resolve) => setTimeout(resolve, 1200))")  # an answer may have been on its way
    before = asked()
    page.value("new Promise((resolve) => setTimeout(resolve, 1500))")
    assert asked() == before
    hide(False)
    until(lambda: asked() > before)


@pytest.mark.chromium
def test_a_lost_worker_and_a_lost_server_are_told(model: Path, page: chromium.Page, tmp_path: Path) -> None:
    once = tmp_path / "once.yaml"
    once.write_text("cluster: {restarts: 0}\n")
    with serve(model, str(once)) as server:
        page.open(server.url)
        page.until(f"{card('ffn 1')} !== null")
        os.kill(server.worker("ffn", 1)["pid"], signal.SIGKILL)
        page.until(f"{card('ffn 1', '.statename')}.textContent === 'lost'")
        until(lambda: server.status()["problem"])
        page.until(f"document.getElementById('problems').innerText.includes({server.status()['problem']!r})")
        assert page.value("document.getElementById('state').textContent") == "cannot serve"
        assert page.value(f"{card('ffn 0', '.statename')}.textContent") == "ready"
        server.stop()
        page.until("document.getElementById('state').textContent === 'no answer'")
        assert "what is below is old" in page.text()


class Keyed(BaseHTTPRequestHandler):
    """A server that shows the page to everybody and its figures to who has the key."""

    def do_GET(self) -> None:
        page = asyncio.run(Page().show())
        if self.path == "/":
            self.answer(200, bytes(page.body), dict(page.headers))
        elif self.headers["Authorization"] == "Bearer right":
            self.answer(503, b'{"error": {"message": "no figures yet"}}', {})
        else:
            self.answer(401, b'{"error": {"message": "this server wants an API key"}}', {})

    def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in (headers | {"content-length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.mark.chromium
def test_the_page_asks_for_a_key_where_the_server_wants_one(page: chromium.Page) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Keyed) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        page.open(f"http://127.0.0.1:{server.server_port}/")
        page.until("!document.getElementById('keyform').hidden")
        assert "this server wants an API key" in page.text()
        page.value("document.getElementById('key').value = 'right'")
        page.value("document.getElementById('keyform').requestSubmit()")
        page.until("document.getElementById('keyform').hidden")
        page.until("document.body.innerText.includes('no figures yet')")
        server.shutdown()


def test_a_missing_chromium_skips_these_tests_and_fails_them_where_it_is_required(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv(chromium.REQUIRED, raising=False)
    with pytest.raises(pytest.skip.Exception, match="no chromium"):
        chromium.executable()
    monkeypatch.setenv(chromium.REQUIRED, "1")
    with pytest.raises(pytest.fail.Exception, match=f"{chromium.REQUIRED}=1"):
        chromium.executable()
