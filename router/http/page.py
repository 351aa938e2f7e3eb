"""The status page at `/`: one HTML document without anything from elsewhere, put together from router/http/static."""

from __future__ import annotations

import base64
import hashlib
from importlib import resources

from starlette.responses import Response

SCRIPTS = ("figures.js", "strip.js", "status.js")


class Page:
    """Reads its parts when it is made."""

    def __init__(self) -> None:
        style, script = _read("status.css"), "\n".join(map(_read, SCRIPTS))
        html = _read("status.html").replace("/* style */", style).replace("/* script */", script)
        self._content = html.encode()
        self._headers = {
            "cache-control": "no-cache",
            "content-security-policy": _policy(style, script),
            "referrer-policy": "no-referrer",
            "x-content-type-options": "nosniff",
        }

    async def show(self) -> Response:
        """GET /."""
        return Response(self._content, media_type="text/html; charset=utf-8", headers=self._headers)


def _policy(style: str, script: str) -> str:
    """Only this very style and script count, nothing but the server's answers is loaded, no frame shows the page."""
    return "; ".join(
        (
            "default-src 'none'",
            f"style-src 'sha256-{_digest(style)}'",
            f"script-src 'sha256-{_digest(script)}'",
            "connect-src 'self'",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        )
    )


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _read(name: str) -> str:
    return (resources.files("router.http") / "static" / name).read_text(encoding="utf-8")
