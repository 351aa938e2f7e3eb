"""What others on the machine and on the network see of a server with keys and a token: no port that it was not told to
open, and no secret on a command line, in a log, or in the environment of a process that has no use for it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import grpc
import httpx
import psutil
import pytest

from afd.credentials import Credentials
from afd.rpc import secure
from tests import certificates, tiny
from tests.system.serving import Serving, serving, until

SECRETS = {"AFD_API_KEYS": "key-of-the-environment", "AFD_CLUSTER_TOKEN": "token-of-the-environment"}
IN_FILE, WRONG = "key-of-the-file", "what-a-stranger-tried"
LOOPBACK = {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


@pytest.fixture(scope="module", params=["local", pytest.param("ray", marks=pytest.mark.ray)])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    folder = tmp_path_factory.mktemp("deployment")
    (folder / "keys").write_text(f"{IN_FILE}\n")
    settings = f"router: {{api_keys_file: {folder / 'keys'}}}\n"
    tls = certificates.authority(folder, "ours").gives("worker", "IP:127.0.0.1") if request.param == "local" else None
    if tls is not None:
        settings += f"transport: {{kind: grpc, tls: {tls.model_dump_json()}}}\n"
    (folder / "deployment.yaml").write_text(settings)
    environment = {**SECRETS, "AFD_LOG": "debug"}
    arguments = (str(folder / "deployment.yaml"), "--backend", request.param)
    with serving(tiny.write(folder / "tiny"), *arguments, environment=environment) as running:
        running.api_key, running.tls = IN_FILE, tls
        for key, status in ((IN_FILE, 200), (SECRETS["AFD_API_KEYS"], 200), (WRONG, 401)):
            body = {"model": "tiny", "prompt": [5], "max_tokens": 3}
            header = {"Authorization": f"Bearer {key}"}
            answer = httpx.post(f"{running.url}/v1/completions", json=body, headers=header, timeout=60.0)
            assert answer.status_code == status
        yield running


def family(server: Serving) -> list[psutil.Process]:
    """The server, its workers, and all of a Ray that it has started."""
    root = psutil.Process(server.process.pid)
    return [root, *root.children(recursive=True)]


def listening(process: psutil.Process) -> set[tuple[str, str, int]]:
    """(name, address, port) of each port it listens at."""
    try:
        found = [c for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN]
        return {(process.name(), c.laddr.ip, c.laddr.port) for c in found}
    except psutil.NoSuchProcess:  # Ray ends idle ones
        return set()


def everything_listening(server: Serving) -> set[tuple[str, str, int]]:
    return set().union(*map(listening, family(server)))


def logs(server: Serving) -> Iterator[tuple[str, bytes]]:
    """What it printed, and every file of its Ray."""
    yield "standard output", "".join(server.lines).encode()
    folders = {
        word.split("=", 1)[-1]
        for process in family(server)
        for word in read(process, "cmdline").decode().split("\0")
        if "/afd-ray-" in word
    }
    sessions = {Path(*Path(word).parts[:3]) for word in folders if word.startswith("/tmp/afd-ray-")}
    assert bool(sessions) is any("raylet" in process.name() for process in family(server))
    for file in (file for session in sessions for file in session.rglob("*") if file.is_file()):
        yield str(file), file.read_bytes()


def read(process: psutil.Process, name: str) -> bytes:
    try:
        return Path(f"/proc/{process.pid}/{name}").read_bytes()
    except OSError:
        return b""


def test_no_process_listens_beyond_loopback(server: Serving) -> None:
    ports = everything_listening(server)
    assert len(ports) >= 3  # the router's, and a worker's of each role
    assert {address for _, address, _ in ports} <= LOOPBACK, sorted(ports)


def test_no_secret_is_on_a_command_line_or_where_a_child_does_not_need_it(server: Serving) -> None:
    workers = [psutil.Process(worker["pid"]) for worker in server.status()["workers"]]
    assert set(workers) <= set(family(server))
    secrets = [*SECRETS.values(), IN_FILE, *ray_tokens(server)]
    for process in family(server):
        assert not [s for s in secrets if s.encode() in read(process, "cmdline")], process
    for child in family(server)[1:]:
        assert not [s for s in SECRETS.values() if s.encode() in read(child, "environ")], child


def test_no_secret_is_in_a_log(server: Serving) -> None:
    ports = [port for name, _, port in everything_listening(server)]
    refused = 0
    for port in ports:
        stranger = Credentials(WRONG, server.tls)
        with secure.channel(f"127.0.0.1:{port}", stranger, ()) as channel:
            try:
                ask = channel.unary_unary("/afd.rpc.Attention/Status")
                ask(b"", metadata=secure.metadata(stranger), timeout=2.0)
            except grpc.RpcError as error:
                refused += error.code() is grpc.StatusCode.UNAUTHENTICATED
    assert refused >= 2  # both workers, at least
    until(lambda: sum("refused a call of" in text.decode(errors="replace") for _, text in logs(server)) > 0)
    key = "" if server.tls is None else Path(server.tls.key).read_text().splitlines()[1]
    secrets = list(filter(None, [*SECRETS.values(), IN_FILE, WRONG, key, *ray_tokens(server)]))
    told = [(where, secret) for where, text in logs(server) for secret in secrets if secret.encode() in text]
    assert told == []


def ray_tokens(server: Serving) -> set[str]:
    """The token of its Ray: Ray's own processes are given it in their environment, there being no other way."""
    entries = [entry for child in family(server)[1:] for entry in read(child, "environ").split(b"\0")]
    return {entry.decode().split("=", 1)[1] for entry in entries if entry.startswith(b"RAY_AUTH_TOKEN=")}
