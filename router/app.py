"""The HTTP application and the server that runs it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import AsyncIterator, Callable, Iterator

import uvicorn
import uvloop
from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from afd.errors import ClusterError, ConfigError
from afd.types import ClusterView
from router.gateway import VERSION, Gateway
from router.http import errors, openapi
from router.http.front_door import FrontDoor
from router.http.page import Page
from router.http.protocol import limited
from router.settings import RouterSettings
from router.telemetry.bubbles import Bubbles
from router.telemetry.debug import Debug, Timelines, nobody
from router.telemetry.live import Live

__all__ = ["RouterSettings", "Server", "bind", "create_app"]

log = logging.getLogger(__name__)

_KEEP_ALIVE_S = 75  # longer than clients keep an idle connection, so that none is closed just as it is used again
_CLOSE_S = 2  # longest wait for connections to close once their requests have ended


def create_app(settings: RouterSettings, watch: Callable[[], ClusterView], timelines: Timelines = nobody) -> FastAPI:
    """The application; its Gateway is `app.state.gateway`. `watch` gives the latest cluster view, is cheap, and is
    called on the application's event loop; `timelines` (afd.cluster.controller.Cluster.timelines) may take seconds, and
    is called on a thread.

    Raises CheckpointError for a damaged tokenizer or chat template, ConfigError for an unknown policy or spans without
    their packages.
    """
    gateway = Gateway(settings, watch)
    bubbles = Bubbles(timelines)
    gateway.show(bubbles)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await gateway.pool.start()
        looking = asyncio.create_task(bubbles.run())
        try:
            yield
        finally:
            looking.cancel()
            await gateway.pool.close()
            await gateway.close()

    # Swagger's and ReDoc's pages would load their parts from elsewhere; the document itself is at /openapi.json.
    app = FastAPI(title="afd", version=VERSION, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.gateway = gateway
    for path, method, endpoint in (
        ("/v1/chat/completions", "POST", gateway.chat_completions),
        ("/v1/completions", "POST", gateway.completions),
        ("/v1/models", "GET", gateway.models),
        ("/v1/models/{model_id:path}", "GET", gateway.model),
        ("/tokenize", "POST", gateway.tokenize),
        ("/detokenize", "POST", gateway.detokenize),
        ("/health", "GET", gateway.health),
        ("/health", "HEAD", gateway.health),
        ("/ready", "GET", gateway.ready),
        ("/ready", "HEAD", gateway.ready),
        ("/version", "GET", gateway.version),
        ("/metrics", "GET", gateway.metrics),
        ("/status", "GET", gateway.status),
        ("/status/pipeline", "GET", Live(gateway, timelines).pipeline),
        ("/debug/timeline", "GET", Debug(timelines).timeline),
    ):
        # To HEAD, which load balancers ask, the server sends no body.
        app.add_api_route(path, endpoint, methods=[method], include_in_schema=method != "HEAD")
    app.add_api_route("/", Page().show, methods=["GET", "HEAD"], include_in_schema=False)
    openapi.describe(app, settings.model_name, keyed=bool(settings.api_keys))
    app.add_exception_handler(HTTPException, _refused)
    app.add_exception_handler(ClientDisconnect, _left)
    app.add_exception_handler(Exception, _failed)
    return app


async def _refused(request: Request, error: Exception) -> Response:
    """Unknown routes and wrong methods."""
    assert isinstance(error, HTTPException), f"handler for HTTPException got {error!r}"
    message = f"{request.method} {request.url.path}: {error.detail}"
    return errors.json_response(error.status_code, errors.shape(error.status_code, message), error.headers)


async def _left(_request: Request, _error: Exception) -> Response:
    """The client hung up while sending; nobody reads this."""
    return Response(status_code=499)  # nginx's word for it


async def _failed(_request: Request, error: Exception) -> Response:
    """A bug outside generation; the server logs it."""
    return errors.response(error)


def bind(host: str, port: int) -> socket.socket:
    """A socket on host:port (port 0: any free one) for `Server`. Call it early: a taken port then fails before workers
    start. It does not listen yet, so that nobody connects to a server that cannot answer.

    Raises ConfigError naming host, port and the settings.
    """
    where = f"{host}:{port}"
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as error:
        raise ConfigError(
            f"cannot listen on {where}: {error.strerror}; router.host (--host) must be an address of this machine"
        ) from error
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except OSError as error:
        sock.close()
        raise ConfigError(
            f"cannot listen on {where}: {error.strerror}; choose another router.port (--port) or router.host (--host)"
        ) from error
    return sock


class _Uvicorn(uvicorn.Server):
    """Uvicorn that leaves signals to the process it runs in, and says when it listens."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listening = asyncio.Event()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        for sock in sockets or ():
            sock.listen(self.config.backlog)  # uvloop says nothing when somebody else has taken the port meanwhile
        await super().startup(sockets)
        self.listening.set()


class Server:
    """Serves HTTP on a bound socket. `run` blocks in one thread; `stop` may come from any thread or signal handler,
    before `run` too. The socket is closed when `run` returns."""

    def __init__(
        self,
        settings: RouterSettings,
        watch: Callable[[], ClusterView],
        sock: socket.socket,
        *,
        timelines: Timelines = nobody,
        on_ready: Callable[[str], None] = lambda _: None,
    ) -> None:
        """`on_ready` is called with the server's URL on the thread of `run`, once requests are accepted. Raises what
        create_app raises."""
        self._settings = settings
        self._app = create_app(settings, watch, timelines)
        ended = self._app.state.gateway.ended
        self._door = FrontDoor(self._app, keys=settings.api_keys, origins=settings.cors_origins, on_end=ended)
        self._sock = sock
        self._on_ready = on_ready
        self._stop_wanted = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopping: asyncio.Event | None = None

    @property
    def url(self) -> str:
        """Where clients on this machine reach the server."""
        host, port = self._sock.getsockname()[:2]
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def run(self) -> None:
        """Serves until `stop`; then drains and returns. Raises ClusterError when the server cannot start."""
        with contextlib.closing(self._sock):
            try:
                uvloop.run(self._serve())
            except SystemExit as error:  # uvicorn's way to say that the application did not start
                raise ClusterError(f"the HTTP server on {self.url} could not start; its log says why") from error

    def stop(self) -> None:
        """New requests get 503; those in flight may finish for drain_s seconds and are told after that; then `run`
        returns. Idempotent, does not wait."""
        self._stop_wanted = True  # no lock: a signal handler may interrupt another call of this
        loop, stopping = self._loop, self._stopping
        if loop is not None and stopping is not None:
            with contextlib.suppress(RuntimeError):  # the loop has closed: `run` has returned
                loop.call_soon_threadsafe(stopping.set)

    async def _serve(self) -> None:
        self._stopping = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        if self._stop_wanted:
            return
        url, gateway = self.url, self._app.state.gateway
        config = uvicorn.Config(
            self._door,
            http=limited(self._settings.max_header_bytes, self._settings.max_headers, gateway.refused),
            log_config=None,
            access_log=False,
            ws="none",
            lifespan="on",
            timeout_keep_alive=_KEEP_ALIVE_S,
            timeout_graceful_shutdown=_CLOSE_S,
        )
        server = _Uvicorn(config)
        serving = asyncio.create_task(server.serve([self._sock]))
        waits = [asyncio.create_task(event.wait()) for event in (server.listening, self._stopping)]
        try:
            await asyncio.wait({serving, waits[0]}, return_when=asyncio.FIRST_COMPLETED)
            if not serving.done():
                self._on_ready(url)
                await asyncio.wait({serving, waits[1]}, return_when=asyncio.FIRST_COMPLETED)
                await gateway.drain()
        finally:
            server.should_exit = True
            for wait in waits:
                wait.cancel()
            try:
                await serving
            except OSError as error:
                raise ClusterError(
                    f"the HTTP server on {url} stopped: {error}; choose another router.port (--port) if it is taken"
                ) from error
