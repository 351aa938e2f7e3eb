"""What a deployment file and the environment come to in the router."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from afd import spec as specs
from afd.cluster import launch
from afd.config import Deployment, parse
from afd.credentials import OPEN, Credentials, for_run
from afd.errors import ConfigError
from afd.types import ClusterView, Role, WorkerView
from router.settings import RouterSettings
from tests import tiny


def settings(deployment: Deployment, credentials: Credentials = OPEN) -> RouterSettings:
    files: Any = SimpleNamespace(
        name="tiny", tokenizer_json=Path("tokenizer.json"), tokenizer_config={}, generation_config={}
    )
    router = SimpleNamespace(RouterSettings=RouterSettings)
    made = launch.router_settings(router, deployment, files, specs.from_config(tiny.CONFIG), credentials)
    assert isinstance(made, RouterSettings)
    return made


def test_every_setting_of_the_file_reaches_the_router(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = tmp_path / "keys"
    keys.write_text("in-file\n")
    monkeypatch.setenv("AFD_API_KEYS", "in-environment,in-file")
    section = {
        "api_keys_file": str(keys),
        "cors_origins": ["https://page.example"],
        "max_body_mib": 0.5,
        "max_header_kib": 8.0,
        "max_headers": 40,
        "trust_request_chat_template": True,
        "otlp_endpoint": "http://127.0.0.1:4318",
        "prices": {"attention": 2.0, "ffn": 1.0},
    }
    made = settings(parse({"router": section}, "test"))
    assert made.api_keys == ("in-file", "in-environment")
    assert (made.cors_origins, made.max_body_bytes) == (("https://page.example",), 1 << 19)
    assert (made.max_header_bytes, made.max_headers, made.trust_request_chat_template) == (8192, 40, True)
    assert made.otlp_endpoint == "http://127.0.0.1:4318"
    assert made.usd_per_hour == {Role.ATTENTION: 2.0, Role.FFN: 1.0}
    assert "in-file" not in repr(made)


def test_the_environment_names_the_collector_where_the_file_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT", raising=False)
    assert settings(Deployment()).otlp_endpoint == ""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://collector:4318")
    assert settings(Deployment()).otlp_endpoint == "http://collector:4318"


def test_a_file_of_keys_that_is_not_there_stops_the_start() -> None:
    with pytest.raises(ConfigError, match=r"router\.api_keys_file"):
        settings(parse({"router": {"api_keys_file": "/nowhere/keys"}}, "test"))


def test_the_fingerprint_changes_with_what_may_change_an_answer() -> None:
    plain = settings(Deployment()).fingerprint
    assert plain == settings(Deployment()).fingerprint
    others = [
        settings(parse(data, "test")).fingerprint
        for data in ({"topology": "1A2F"}, {"dtype": "bf16"}, {"transport": {"dispatch_dtype": "fp8"}})
    ]
    assert len({plain, *others}) == 4
    assert settings(parse({"router": {"port": 1}}, "test")).fingerprint == plain


def test_a_router_has_its_runs_token_and_does_not_show_it() -> None:
    run = for_run(Deployment())
    made = settings(Deployment(), run)
    assert made.credentials == run
    assert run.token not in repr(made)


@pytest.mark.parametrize(
    ("address", "transport", "said"),
    [
        ("127.0.0.1:4000", {}, []),
        ("[::1]:4000", {}, []),
        ("192.0.2.7:4000", {}, ["workers listen on 192.0.2.7 in plain gRPC"]),
        ("192.0.2.7:4000", {"tls": {"cert": "c", "key": "k", "ca": "a"}}, []),
        ("192.0.2.7:4000", {"kind": "collective"}, ["in plain gRPC", "the collective transport asks nobody"]),
        ("127.0.0.1:4000", {"kind": "collective"}, []),
    ],
)
def test_wires_that_others_can_read_are_told_once(
    address: str, transport: dict[str, object], said: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    workers = tuple(WorkerView(Role.ATTENTION, rank, "ready", address) for rank in range(3))
    deployment = parse({"transport": transport}, "test")
    launch._warn_of_open_wires(deployment, ClusterView(1, "m", "3A1F", (WorkerView(Role.FFN, 0, "ready"), *workers)))
    assert len(caplog.messages) == len(said)
    assert all(words in message for words, message in zip(said, caplog.messages, strict=True))
