"""HTTP/1.1 as uvicorn speaks it with httptools, and limits on the head of a request, which uvicorn has none for."""

from __future__ import annotations

import logging
from collections.abc import Callable

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from router.http import errors

log = logging.getLogger(__name__)


class _HeadTooLarge(Exception):
    """Stops the parser; it comes back to data_received as the parser's own error."""


def limited(max_bytes: int, max_headers: int, on_refusal: Callable[[int], None]) -> type[HttpToolsProtocol]:
    """The protocol with these limits, for uvicorn.Config(http=…). A head beyond them is answered with 431, and what is
    not HTTP with 400; no application sees those, and `on_refusal` is told their status, on the server's event loop."""

    class LimitedProtocol(HttpToolsProtocol):
        _in_head = False
        _head_bytes = 0  # of lines that are over
        _pending_bytes = 0  # read since, while the head went on

        def data_received(self, data: bytes) -> None:
            if self.transport.is_closing():
                return
            began_in_head = self._in_head
            super().data_received(data)
            if began_in_head and self._in_head and not self.transport.is_closing():
                self._pending_bytes += len(data)  # the parser keeps a line that is not over to itself
                if self._pending_bytes > max_bytes:
                    self.send_400_response("")

        def on_message_begin(self) -> None:
            super().on_message_begin()
            self._in_head, self._head_bytes, self._pending_bytes = True, 0, 0

        def on_url(self, url: bytes) -> None:
            self._count(len(url))
            super().on_url(url)

        def on_header(self, name: bytes, value: bytes) -> None:
            self._count(len(name) + len(value) + 4)
            if len(self.headers) >= max_headers:
                self._head_bytes = max_bytes + 1
                raise _HeadTooLarge
            super().on_header(name, value)

        def on_headers_complete(self) -> None:
            self._in_head = False
            super().on_headers_complete()

        def send_400_response(self, msg: str) -> None:
            if self._head_bytes <= max_bytes and self._pending_bytes <= max_bytes:
                on_refusal(400)
                super().send_400_response(msg)
                return
            on_refusal(431)
            sentence = (
                f"the head of the request is longer than {max_bytes} bytes (router.max_header_kib) or has more than "
                f"{max_headers} header lines (router.max_headers)"
            )
            log.info("refused a request: %s", sentence)
            content = errors.shape(431, sentence, code="headers_too_large")
            head = (
                "HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-type: application/json\r\n"
                f"content-length: {len(content)}\r\nconnection: close\r\n\r\n"
            )
            self.transport.write(head.encode() + content)
            self.transport.close()

        def _count(self, num_bytes: int) -> None:
            self._head_bytes += num_bytes
            if self._head_bytes > max_bytes:
                raise _HeadTooLarge

    return LimitedProtocol
