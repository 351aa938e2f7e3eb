"""`afd router`: further routers in front of the same workers, on Ray, which come and go while the workers stay."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from afd.cluster.replica import joined
from afd.config import Deployment
from afd.errors import ConfigError
from tests import tiny
from tests.system.serving import AFD, Serving, running, until


@dataclass
class Run:
    """Workers without a router, on a Ray that others may join with `environment`."""

    cluster: Any
    deployment: Deployment
    environment: dict[str, str]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    ray_host = pytest.importorskip("afd.cluster.ray_host")
    model = tiny.write(tmp_path_factory.mktemp("models") / "tiny")
    deployment = Deployment().with_flags({"model": str(model), "topology": "2A1F", "router.port": 0})
    with ray_host.cluster(deployment) as cluster:
        assert cluster.wait_ready(120.0)
        address = ray_host.ray.get_runtime_context().gcs_address
        yield Run(cluster, deployment, {"RAY_ADDRESS": address})


def ids(server: Serving) -> list[int]:
    body = {"model": "tiny", "prompt": [1, 2, 3], "max_tokens": 20, "temperature": 0, "return_token_ids": True}
    answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60.0)
    assert answer.status_code == 200, answer.text
    return list(answer.json()["choices"][0]["token_ids"])


def pids(run: Run) -> set[int]:
    assert [worker.state for worker in run.cluster.view().workers] == ["ready"] * 3
    return {worker.pid for worker in run.cluster.view().workers}


def refusal(run: Run | None, *arguments: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    command = [AFD, "router", *arguments]
    env = environment | (run.environment if run else {})
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=env)
    assert (done.returncode, "Traceback" in done.stderr) == (2, False), done.stderr
    return " ".join(done.stderr.split())


@pytest.mark.ray
def test_two_routers_share_the_workers_and_leave_them_as_they_are(run: Run) -> None:
    before = pids(run)
    with running([AFD, "router"], environment=run.environment) as first:
        until(lambda: httpx.get(f"{first.url}/ready").status_code == 200)
        with running([AFD, "router", "--port", "0"], environment=run.environment) as second:
            until(lambda: httpx.get(f"{second.url}/ready").status_code == 200)
            assert first.url != second.url
            assert ids(first) == ids(second)
            assert first.status()["workers"][0]["pid"] == second.status()["workers"][0]["pid"]
            summary = httpx.get(f"{second.url}/debug/timeline?format=summary", timeout=30.0).json()
            assert len(summary["workers"]) == 3
            code, _ = second.stop()
            assert code == 0, second.lines
        assert ids(first)
    assert pids(run) == before


@pytest.mark.ray
def test_what_cannot_be_joined_is_one_sentence(run: Run, tmp_path: Path) -> None:
    (tmp_path / "other.yaml").write_text("topology: 4A4F\n")
    epoch = run.cluster.view().epoch
    assert f"none has the epoch 7; --epoch may be {epoch}" in refusal(run, "--epoch", "7")
    assert "other.yaml is not what the workers were started with" in refusal(run, str(tmp_path / "other.yaml"))


def test_without_a_ray_cluster_there_is_no_further_router() -> None:
    assert "RAY_ADDRESS is not set" in refusal(None)


def test_a_router_has_its_own_section_of_the_file_and_else_the_runs(tmp_path: Path) -> None:
    theirs = Deployment().with_flags({"topology": "2A1F", "router.port": 9000, "router.max_queue": 5})
    assert joined(theirs, Deployment(), None, {"router.port": 0}).router.max_queue == 5
    ours = theirs.with_flags({"router.port": 1, "router.max_queue": 7})
    assert joined(theirs, ours, tmp_path / "ours.yaml", {}) == ours
    with pytest.raises(ConfigError, match=r"ours.yaml is not what .*: topology is 1A1F, not 2A1F"):
        joined(theirs, Deployment(), tmp_path / "ours.yaml", {})
