"""Two Ray nodes on two hosts, started by the commands of deploy/README.md: attention on one, FFN on the other, gRPC
over a cable between them, which is cut for a while."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import httpx
import openai
import pytest
import torch

from afd import env
from afd import spec as specs
from afd.models import registry
from afd.weights import dummy
from tests import rig, tiny
from tests.hosts import Host, Hosts, hosts, missing
from tests.recipes import recipe
from tests.system.serving import READY, Serving, running, until

pytestmark = [pytest.mark.ray, pytest.mark.namespaces]

ROOT = Path(__file__).parents[2]
CUT_S = 3.0
TOKENS = 700


@pytest.fixture(scope="module")
def two() -> Iterator[Hosts]:
    pytest.importorskip("afd.cluster.ray_core")
    if reason := missing():
        if os.environ.get("REQUIRE_NAMESPACES"):
            pytest.fail(reason)
        pytest.skip(reason)
    with hosts() as both:
        yield both


@pytest.fixture(scope="module")
def environment() -> Iterator[dict[str, str]]:
    """Of every shell on both hosts."""
    home = tempfile.mkdtemp(prefix="afd-two-", dir="/tmp")  # short: Ray's sockets lie deep below
    yield {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "HOME": home,
        "AFD_CACHE": str(env.read().cache),
        "OMP_NUM_THREADS": "1",
    }
    shutil.rmtree(home, ignore_errors=True)


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> str:
    """For `afd serve`: a tiny model instead of the default one."""
    return f"--model {tiny.write(tmp_path_factory.mktemp('models') / 'tiny')} --port 0 --dtype fp32"


@pytest.fixture(scope="module")
def exports(two: Hosts, environment: dict[str, str]) -> str:
    """Both Ray nodes run; what the first host's shell has exported."""
    first, second, _ = recipe("Two machines")
    shell(two.first, first, environment)
    shell(two.second, second, environment)
    return next(line for line in first.splitlines() if line.startswith("export "))


@pytest.fixture(scope="class")
def server(two: Hosts, exports: str, environment: dict[str, str], flags: str) -> Iterator[Serving]:
    """`afd serve` on both."""
    script = f"{exports}\n{recipe('Two machines')[2].strip()} {flags}"
    with running(bash(two.first, script), environment=environment) as started, two.first.entered():
        yield started


def bash(host: Host, script: str) -> list[str]:
    """A shell on that host, without what Rays of other tests have left in this process's environment."""
    return host.command("bash", "-ec", f"unset ${{!RAY_*}}; export RAY_TMPDIR=$HOME; cd {ROOT}\n{script}")


def shell(host: Host, script: str, environment: dict[str, str]) -> str:
    """Runs it, and gives what it printed."""
    done = subprocess.run(
        bash(host, script), env={**os.environ, **environment}, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def oracle() -> rig.WholeModel:
    spec = specs.from_config(tiny.CONFIG)
    torch.set_num_threads(1)
    return rig.whole(spec, dummy.weights(registry.family(spec.family).tensors(spec), 0))


def stream(url: str, prompt: list[int], tokens: int) -> Iterator[int]:
    """Token ids of a greedy completion, as they come."""
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        chunks = client.completions.create(
            model="tiny",
            prompt=prompt,
            max_tokens=tokens,
            temperature=0,
            stream=True,
            extra_body={"ignore_eos": True, "return_token_ids": True},
        )
        for chunk in chunks:
            for choice in chunk.choices:
                yield from getattr(choice, "token_ids", None) or []


class TestServing:
    def test_each_role_is_on_its_host_and_listens_at_an_address_that_the_other_reaches(
        self, two: Hosts, server: Serving
    ) -> None:
        workers = {w["role"]: w for w in server.status()["workers"]}
        assert workers["attention"]["pid"] in two.first.pids()
        assert workers["ffn"]["pid"] in two.second.pids()
        assert workers["attention"]["address"].startswith(f"{two.first.address}:")
        with two.second.entered(), pytest.raises(httpx.ConnectError):  # the router was not told to leave loopback
            httpx.get(f"http://{two.first.address}:{server.url.rpartition(':')[2]}/health", timeout=5.0)

    def test_tokens_are_the_whole_models(self, server: Serving, oracle: rig.WholeModel) -> None:
        for prompt in ([1, 2, 3], list(range(200))):
            assert list(stream(server.url, prompt, 40)) == oracle.generate(prompt, 40)

    def test_a_cable_that_is_cut_for_3_s_costs_time_and_no_token(
        self, two: Hosts, server: Serving, oracle: rig.WholeModel
    ) -> None:
        prompt, healed = [7, 8, 9], threading.Timer(CUT_S, two.heal)
        tokens = stream(server.url, prompt, TOKENS)
        got, came_at = [next(tokens) for _ in range(20)], [time.monotonic()]
        two.cut()
        healed.start()
        try:
            for token in tokens:
                got.append(token)
                came_at.append(time.monotonic())
        finally:
            healed.join()
        assert max(after - before for before, after in pairwise(came_at)) > 0.8 * CUT_S
        assert got == oracle.generate(prompt, TOKENS)
        assert list(stream(server.url, [4], 10)) == oracle.generate([4], 10)


@pytest.mark.skipif(
    not find_spec("aiohttp_cors"),
    reason="Ray's dashboard, which takes jobs, is not installed: pip install 'afd[cluster]'",
)
def test_a_job_serves_until_it_is_stopped(
    two: Hosts, exports: str, environment: dict[str, str], flags: str, oracle: rig.WholeModel
) -> None:
    _, submit, logs, stop = recipe("A job")[0].strip().splitlines()
    shell(two.first, f"{exports}\n{submit} {flags}", environment)
    until(lambda: READY.search(shell(two.first, f"{exports}\n{logs}", environment)), seconds=60.0)
    found = READY.search(shell(two.first, f"{exports}\n{logs}", environment))
    assert found
    with two.first.entered():
        assert list(stream(found[1], [1, 2, 3], 40)) == oracle.generate([1, 2, 3], 40)
        shell(two.first, f"{exports}\n{stop}", environment)
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{found[1]}/health", timeout=5.0)
