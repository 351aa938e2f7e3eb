"""What a deployment means for a worker."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from afd import build
from afd.config import Deployment
from afd.errors import CheckpointError
from afd.types import Role
from tests import tiny


def test_an_answer_ends_with_the_end_tokens_of_both_config_and_generation_config(tmp_path: Path) -> None:
    folder = tiny.write(tmp_path / "model")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [256, 259]}))
    assert build.plan(Deployment(model=str(folder))).spec.eos_token_ids == (256, 259)


def test_end_tokens_that_are_no_token_ids_are_refused(tmp_path: Path) -> None:
    folder = tiny.write(tmp_path / "model")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": "</s>"}))
    with pytest.raises(CheckpointError, match="eos_token_id '</s>'"):
        build.plan(Deployment(model=str(folder)))


def test_weights_are_let_go_of_as_a_half_takes_them(tmp_path: Path) -> None:
    plan = build.plan(Deployment(model=str(tiny.write(tmp_path / "model")), dtype="fp32"))
    weights = plan.weights(Role.ATTENTION)
    assert len(weights) > 10
    plan.family.attention(plan.spec, weights)
    assert not weights


def test_both_roles_agree_on_what_they_serve_and_another_models_digest_differs(tmp_path: Path) -> None:
    one = build.plan(Deployment(model=str(tiny.write(tmp_path / "one"))))
    other = build.plan(Deployment(model=str(tiny.write(tmp_path / "other", rms_norm_eps=1e-6))))
    assert one.hello(1, 0, 0) == build.plan(one.deployment).hello(1, 0, 0)
    assert one.model_digest != other.model_digest


def test_threads_share_the_hosts_cores_and_are_at_least_one() -> None:
    assert build.num_threads(5, 2) == 5
    assert build.num_threads("auto", 1000) == 1


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no core affinity on this system")
@pytest.mark.parametrize(
    ("topology", "role", "rank", "expected"),
    [
        ("1A1F", Role.ATTENTION, 0, [0, 1, 2]),
        ("1A1F", Role.FFN, 0, [3, 4, 5]),
        ("2A1F", Role.ATTENTION, 1, [2, 3]),
        ("2A1F", Role.FFN, 0, [4, 5]),
        ("2A2F", Role.FFN, 1, [3]),
        ("4A4F", Role.FFN, 1, None),  # more workers than cores
    ],
)
def test_each_worker_of_a_host_has_cores_of_its_own(
    monkeypatch: pytest.MonkeyPatch, topology: str, role: Role, rank: int, expected: list[int] | None
) -> None:
    pinned: list[list[int]] = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)))
    monkeypatch.setattr(os, "sched_setaffinity", lambda _, cores: pinned.append(list(cores)))
    deployment = Deployment(topology=topology).with_flags({"cluster.pin_cores": True})
    workers = deployment.counts.attention + deployment.counts.ffn
    build.pin(deployment, role, rank, workers)
    assert pinned == ([] if expected is None else [expected])
    build.pin(deployment, role, rank, workers - 1)
    build.pin(deployment.with_flags({"cluster.pin_cores": False}), role, rank, workers)
    assert len(pinned) == (expected is not None), "neither across hosts nor where it is off"


@pytest.mark.parametrize(("cores", "workers", "expected"), [(2, 2, 2000), (2, 3, 50), (8, 2, 2000)])
def test_waits_poll_only_where_each_worker_can_have_a_core(
    monkeypatch: pytest.MonkeyPatch, cores: int, workers: int, expected: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    assert build.spin_us("auto", workers) == expected
    assert build.spin_us(70, workers) == 70
