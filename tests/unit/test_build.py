"""What a deployment means for a worker."""

from __future__ import annotations

import json
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
