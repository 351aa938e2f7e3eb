"""`afd serve`: from a deployment to a running server and back to nothing.

The order is that of what fails soonest: the model's files, the topology, the port, the router's tokenizer, then
the workers; the router runs in this process until a signal ends it.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import AbstractContextManager, closing, contextmanager
from functools import partial
from hashlib import sha256
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

from afd import api_keys, env
from afd import log as logs
from afd import spec as specs
from afd.cluster.controller import Cluster
from afd.cluster.roles import Roles, load
from afd.config import Deployment, PricesSection, RouterSection
from afd.credentials import Credentials, for_run
from afd.errors import CheckpointError, ClusterError
from afd.pipeline.timeline import Timelines
from afd.rpc.secure import is_loopback
from afd.spec import ModelSpec
from afd.topology import ffn_shards
from afd.types import ClusterView, Role
from afd.weights import library

log = logging.getLogger(__name__)

# Loaded by name: Ray is an optional dependency, and takes a second to import.
BACKENDS = {"ray": "afd.cluster.ray_host:cluster", "local": "afd.cluster.local:cluster"}
DRAIN_MARGIN_S = 2.0  # for the router to end after draining
TICK_S = 0.1  # how often a starting cluster is looked at, and a signal obeyed


def serve(deployment: Deployment, roles: Roles = Roles()) -> None:  # noqa: B008
    """Serves until SIGINT or SIGTERM, then drains, stops every worker and returns. Raises AfdError for what cannot be
    served: the model, the topology, the port, or a worker that does not start."""
    logs.setup("router", deployment.router.log_format)
    logging.getLogger("uvicorn").setLevel(logging.WARNING)  # the line with the URL is printed here
    console = Console(stderr=True, highlight=False)
    files = prepared(deployment.model, console)
    spec = specs.from_config(files.config)
    ffn_shards(deployment.counts.ffn, deployment.ffn.sharding, spec.num_experts, deployment.ffn.tp)
    router = load(roles.router)
    credentials = for_run(deployment, env.read().cluster_token)
    settings = router_settings(router, deployment, files, spec, credentials)
    started = time.monotonic()
    with (
        closing(router.bind(deployment.router.host, deployment.router.port)) as door,
        signals() as quitting,
    ):
        watched = _Watched(ClusterView(0, deployment.model, deployment.topology))
        on_ready = partial(announce, deployment, files.name)
        server = router.Server(settings, watched.view, door, timelines=watched.timelines, on_ready=on_ready)
        with open_cluster(deployment, roles, credentials) as cluster:
            watched.cluster = cluster
            quitting.listen()  # again: Ray has put its own handler in the way
            if not _until_ready(cluster, quitting, console):
                return
            console.print(f"workers ready in {time.monotonic() - started:.1f} s")
            _warn_of_open_wires(deployment, cluster.view())
            run_server(server, settings.drain_s, quitting)


def open_cluster(
    deployment: Deployment,
    roles: Roles = Roles(),  # noqa: B008
    credentials: Credentials | None = None,
) -> AbstractContextManager[Cluster]:
    """The deployment's workers, on its backend: a context manager that yields at once and leaves nothing behind.
    `credentials` None: with a token of its own, which nobody else has.

    The inproc transport means threads of this process, whatever the backend. Raises ClusterError without Ray.
    """
    backend = "local" if deployment.transport.kind == "inproc" else deployment.cluster.backend
    cluster: AbstractContextManager[Cluster] = optional_ray(BACKENDS[backend])(deployment, roles, credentials)
    return cluster


def optional_ray(path: str) -> Any:
    """What roles.load gives. Raises ClusterError where it takes Ray and there is none."""
    try:
        return load(path)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "ray":
            raise
        raise ClusterError("Ray is not installed: pip install 'afd[ray]', or set cluster.backend to local") from error


def prepared(name: str, console: Console) -> library.ModelFiles:
    """The model's files; a named model that is not prepared yet is, with a progress bar. Raises ModelError."""
    if any(model.name == name and not model.prepared for model in library.known()):
        prepare(name, console)
    return library.resolve(name)


def prepare(name: str, console: Console, force: bool = False) -> None:
    """Prepares a named model with a progress bar on `console`. Raises ModelError."""
    with_progress("preparing", name, console, lambda report: library.prepare(name, report, force))


def with_progress(doing: str, name: str, console: Console, work: Callable[[library.Progress], object]) -> None:
    """Runs `work` on a model; what it reports moves a progress bar. Raises what `work` does."""
    columns = (
        TextColumn("{task.fields[doing]} {task.fields[model]}"),
        BarColumn(),
        DownloadColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=None, doing=doing, model=name)
        work(lambda done, total, what: progress.update(task, completed=done, total=total or None, description=what))


class _Watched:
    """A view for the router, which is built before the cluster is opened: `nobody` until there is a cluster."""

    def __init__(self, nobody: ClusterView) -> None:
        self.cluster: Cluster | None = None
        self._nobody = nobody

    def view(self) -> ClusterView:
        """Cluster.view."""
        return self.cluster.view() if self.cluster else self._nobody

    def timelines(self, seconds: float, max_events: int) -> Timelines:
        """Cluster.timelines."""
        return self.cluster.timelines(seconds, max_events) if self.cluster else Timelines(())


class _Quit:
    """Counts SIGINT and SIGTERM. They only leave their mark, so nothing is cut off in the middle of starting or
    stopping workers: the main thread looks at `count` between short waits."""

    def __init__(self) -> None:
        self.count = 0

    def listen(self) -> None:
        """Takes the signals from whoever handles them now. Main thread only."""
        signal.signal(signal.SIGINT, self._on_signal)
        signal.signal(signal.SIGTERM, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        self.count += 1


@contextmanager
def signals() -> Iterator[_Quit]:
    """SIGINT and SIGTERM are counted while the block lasts. Main thread only."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    quitting = _Quit()
    quitting.listen()
    try:
        yield quitting
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _until_ready(cluster: Cluster, quitting: _Quit, console: Console) -> bool:
    """False when a signal came first."""
    with console.status("starting") as status:
        while not cluster.wait_ready(TICK_S):
            if quitting.count:
                return False
            status.update(_progress(cluster.view()))
    return True


def _progress(view: ClusterView) -> str:
    ready = sum(worker.state == "ready" for worker in view.workers)
    return f"starting {view.topology} of {view.model}: {ready} of {len(view.workers)} workers ready"


def run_server(server: Any, drain_s: float, quitting: _Quit) -> None:
    """Runs the router until a signal, then lets it drain; a second signal, or a router that does not come to an end,
    cuts that short. The router has a thread of its own so that nothing in it can keep the workers alive."""
    ended: Future[None] = Future()

    def run() -> None:
        try:
            ended.set_result(server.run())
        except BaseException as error:
            ended.set_exception(error)

    threading.Thread(target=run, name="router", daemon=True).start()
    while not ended.done() and not quitting.count:
        wait([ended], TICK_S)
    if quitting.count:
        log.info("shutting down; requests in flight may finish for %g s, Ctrl-C again ends them now", drain_s)
    server.stop()
    patience = time.monotonic() + drain_s + DRAIN_MARGIN_S
    while not ended.done() and quitting.count < 2 and time.monotonic() < patience:
        wait([ended], TICK_S)
    if ended.done():
        ended.result()
    else:
        log.warning("the router was cut off before it had drained")


def router_settings(
    router: Any, deployment: Deployment, files: library.ModelFiles, spec: ModelSpec, credentials: Credentials
) -> Any:
    """The `RouterSettings` of the module `router`. Raises CheckpointError, ConfigError."""
    if files.tokenizer_json is None:
        raise CheckpointError(f"{files.path} has no tokenizer.json, which the router needs to read prompts")
    wanted = deployment.attention.max_context
    return router.RouterSettings(
        model_name=files.name,
        max_context=spec.max_context if wanted == "auto" else min(wanted, spec.max_context),
        vocab_size=spec.vocab,
        tokenizer_json=files.tokenizer_json,
        tokenizer_config=files.tokenizer_config,
        generation_config=files.generation_config,
        policy=deployment.router.policy,
        max_queue=deployment.router.max_queue,
        replay_s=deployment.router.replay_s,
        silence_s=deployment.router.silence_s,
        request_timeout_s=deployment.router.request_timeout_s,
        drain_s=deployment.router.drain_s,
        max_body_bytes=int(deployment.router.max_body_mib * 2**20),
        max_header_bytes=int(deployment.router.max_header_kib * 2**10),
        max_headers=deployment.router.max_headers,
        api_keys=_api_keys(deployment.router),
        cors_origins=tuple(deployment.router.cors_origins),
        trust_request_chat_template=deployment.router.trust_request_chat_template,
        fingerprint=_fingerprint(deployment, spec),
        otlp_endpoint=deployment.router.otlp_endpoint or os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT", ""),
        usd_per_hour=_usd_per_hour(deployment.router.prices),
        tool_parser=deployment.router.tool_parser,
        reasoning_parser=deployment.router.reasoning_parser,
        credentials=credentials,
        # The workers' own deadlines run out first and say more.
        deadline_s=deployment.transport.deadline_s + deployment.cluster.recover_s + 30.0,
    )


def _warn_of_open_wires(deployment: Deployment, view: ClusterView) -> None:
    """Says once what others on the network can read or do."""
    hosts = {worker.address.rpartition(":")[0] for worker in view.workers if worker.address}
    if deployment.transport.tls is not None or all(map(is_loopback, hosts)):
        return
    log.warning(
        "workers listen on %s in plain gRPC: whoever can read that network can read activations, prompts and the "
        "cluster's token; transport.tls encrypts",
        ", ".join(sorted(hosts)),
    )
    if deployment.transport.kind == "collective":
        log.warning(
            "the collective transport asks nobody who they are: whoever reaches its ports can send frames, or end them"
        )


def _api_keys(router: RouterSection) -> tuple[str, ...]:
    """Those in the file and those in the environment. Raises ConfigError."""
    in_file = () if router.api_keys_file is None else api_keys.read(Path(router.api_keys_file).expanduser())
    return tuple(dict.fromkeys([*in_file, *env.read().api_keys]))


def _usd_per_hour(prices: PricesSection) -> dict[Role, float]:
    priced = {Role.ATTENTION: prices.attention, Role.FFN: prices.ffn}
    return {role: usd for role, usd in priced.items() if usd is not None}


def _fingerprint(deployment: Deployment, spec: ModelSpec) -> str:
    """Of what decides the last bits of an answer: the same seed may answer otherwise under another one."""
    split = (deployment.topology, deployment.ffn.sharding, deployment.ffn.tp, deployment.transport.dispatch_dtype)
    parts = (specs.digest(spec), deployment.dtype, deployment.device, *split)
    return "fp_" + sha256("|".join(map(str, parts)).encode()).hexdigest()[:12]


def announce(deployment: Deployment, model: str, url: str) -> None:
    """Prints where the model is served, and what to try."""
    question = '"messages": [{"role": "user", "content": "What is the capital of France?"}]'
    body = f'{{"model": "{model}", "temperature": 0, {question}}}'
    print(f"{model} ({deployment.topology}) is served at {url}/v1 ; Ctrl-C ends it. Try:")
    print(f"  afd chat --url {url}")
    print(f"  curl {url}/v1/chat/completions -H 'Content-Type: application/json' -d '{body}'", flush=True)
