"""What a deployment file and the environment come to in the router."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from afd import spec as specs
from afd.cluster import launch
from afd.config import Deployment, parse
from afd.errors import ConfigError
from afd.types import Role
from router.settings import RouterSettings
from tests import tiny


def settings(deployment: Deployment) -> RouterSettings:
    files: Any = SimpleNamespace(
        name="tiny", tokenizer_json=Path("tokenizer.json"), tokenizer_config={}, generation_config={}
    )
    router = SimpleNamespace(RouterSettings=RouterSettings)
    made = launch.router_settings(router, deployment, files, specs.from_config(tiny.CONFIG))
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
