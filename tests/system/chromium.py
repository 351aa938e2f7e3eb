"""Headless Chromium with one page, driven over its debugging pipe (the Chrome DevTools Protocol: JSON messages)."""

from __future__ import annotations

import base64
import itertools
import json
import os
import queue
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import pytest

REQUIRED = "REQUIRE_CHROMIUM"  # .ci/run sets it: there, a missing browser is a failure
ANSWER_S = 60.0
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--remote-debugging-pipe"),
)


def executable() -> str:
    """Skips the test where there is no Chromium, and fails it where there must be one."""
    found = shutil.which("chromium")
    if found is None and os.environ.get(REQUIRED) == "1":
        pytest.fail(f"there is no chromium, and {REQUIRED}=1 asks for it: apt-get install chromium")
    if found is None:
        pytest.skip("there is no chromium to open the page with: apt-get install chromium")
    return found


class Page:
    """`console`: what it logged as a warning or an error, and what it threw. `requested`: the URLs it asked for."""

    def __init__(self, to_browser: IO[bytes], from_browser: IO[bytes]) -> None:
        self.console: list[str] = []
        self.requested: list[str] = []
        self._to_browser = to_browser
        self._numbers = itertools.count(1)
        self._answers: queue.Queue[dict[str, Any]] = queue.Queue()
        self._session: dict[str, str] = {}
        self._reader = threading.Thread(target=self._read, args=(from_browser,), daemon=True)
        self._reader.start()
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self._session = {"sessionId": session}
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: object) -> dict[str, Any]:
        """The result of a command. Raises AssertionError for the browser's refusal, and when it does not answer."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": params} | self._session
        self._to_browser.write(json.dumps(message).encode() + b"\0")
        self._to_browser.flush()
        while True:
            try:
                answer = self._answers.get(timeout=ANSWER_S)
            except queue.Empty:
                raise AssertionError(f"chromium did not answer {method} within {ANSWER_S:g} s") from None
            if answer["id"] == number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return dict(answer["result"])

    def value(self, expression: str) -> Any:
        """What a JavaScript expression gives, as JSON."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, f"{expression}: {result['exceptionDetails']}"
        return result["result"].get("value")

    def until(self, expression: str, seconds: float = 20.0) -> None:
        """Waits for an expression to become true."""
        deadline = time.monotonic() + seconds
        while not self.value(expression):
            assert time.monotonic() < deadline, f"still not so after {seconds:g} s: {expression}\n{self.text()}"
            threading.Event().wait(0.05)

    def text(self) -> str:
        """What a person reads."""
        return str(self.value("document.body.innerText"))

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)
        self.until("document.readyState === 'complete' && location.protocol !== 'about:'")

    def size(self, width: int, height: int) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )

    def scheme(self, name: str) -> None:
        """light or dark."""
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": name}])

    def screenshot(self, file: Path) -> None:
        """The whole page as PNG."""
        shot = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        file.write_bytes(base64.b64decode(shot["data"]))

    def _read(self, from_browser: IO[bytes]) -> None:
        rest = b""
        while chunk := os.read(from_browser.fileno(), 1 << 16):
            *messages, rest = (rest + chunk).split(b"\0")
            for message in map(json.loads, messages):
                self._take(message)

    def _take(self, message: dict[str, Any]) -> None:
        params = message.get("params", {})
        match message.get("method"):
            case None:
                self._answers.put(message)
            case "Network.requestWillBeSent":
                self.requested.append(params["request"]["url"])
            case "Runtime.exceptionThrown":
                self.console.append(str(params["exceptionDetails"]))
            case "Runtime.consoleAPICalled" if params["type"] in ("error", "warning", "assert"):
                self.console.append(str(params["args"]))
            case "Log.entryAdded" if params["entry"]["level"] in ("error", "warning"):
                self.console.append(f"{params['entry']['text']} {params['entry'].get('url', '')}")


@contextmanager
def page() -> Iterator[Page]:
    """A page in a browser of its own with an empty profile; both are gone afterwards."""
    program = executable()
    down_read, down_write = os.pipe()
    up_read, up_write = os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        # Chromium reads file descriptor 3 and writes to 4.
        command = ["bash", "-c", f'exec "$@" 3<&{down_read} 4>&{up_write}', "chromium", program, *FLAGS]
        with open(Path(profile) / "log", "w") as log:
            browser = subprocess.Popen(
                [*command, f"--user-data-dir={profile}/profile"],
                stdout=log,
                stderr=log,
                pass_fds=(down_read, up_write),
            )
        os.close(down_read)
        os.close(up_write)
        try:
            with open(down_write, "wb") as to_browser, open(up_read, "rb", buffering=0) as from_browser:
                opened = Page(to_browser, from_browser)
                yield opened
                with suppress(AssertionError, OSError):
                    opened._session = {}
                    opened.call("Browser.close")
                opened._reader.join(timeout=10.0)
        finally:
            if browser.poll() is None:
                browser.terminate()
            try:
                browser.wait(timeout=10.0)
            except subprocess.TimeoutExpired:
                browser.kill()
                browser.wait()
