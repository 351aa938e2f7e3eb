from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from afd.types import WorkerView
from router.settings import RouterSettings
from router.text.tokenizer import Tokenizer

sys.path.insert(0, str(Path(__file__).parent))  # for scripted_worker.py, which the tests here share

from scripted_worker import (
    CHAT_TEMPLATE,
    EOS,
    MODEL,
    RunningRouter,
    Say,
    Script,
    ScriptedWorker,
    build_tokenizer,
    cluster,
)


@pytest.fixture(scope="session")
def tokenizer_json(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def tokenizer(tokenizer_json: Path) -> Tokenizer:
    return Tokenizer(tokenizer_json)


@pytest.fixture
def settings(tokenizer_json: Path) -> RouterSettings:
    return RouterSettings(
        model_name=MODEL,
        max_context=256,
        vocab_size=512,
        tokenizer_json=tokenizer_json,
        tokenizer_config={"chat_template": CHAT_TEMPLATE, "eos_token": EOS},
        poll_s=0.02,
        drain_s=5.0,
        replay_s=0.0,
    )


@pytest.fixture
def worker(tokenizer: Tokenizer) -> Iterator[ScriptedWorker]:
    worker = ScriptedWorker(Say(tokenizer.encode("Paris is the city of light", special=False)))
    yield worker
    worker.die()


@pytest.fixture
def start() -> Iterator[Callable[..., RunningRouter]]:
    """Starts routers over the workers it is given; closes them after the test."""
    started: list[RunningRouter] = []

    def start(settings: RouterSettings, *workers: ScriptedWorker | WorkerView) -> RunningRouter:
        views = [worker.view() if isinstance(worker, ScriptedWorker) else worker for worker in workers]
        started.append(RunningRouter(settings, cluster(*views)))
        return started[-1]

    yield start
    for router in started:
        router.close()


@pytest.fixture
def router(start: Callable[..., RunningRouter], settings: RouterSettings, worker: ScriptedWorker) -> RunningRouter:
    return start(settings, worker)


@pytest.fixture
def say(tokenizer: Tokenizer) -> Callable[..., Script]:
    """A script that says a text."""

    def say(text: str, finish: str = "stop", stop_token_id: int | None = None) -> Script:
        return Say(tokenizer.encode(text, special=False), finish, stop_token_id)

    return say
