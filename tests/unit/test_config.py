from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from afd.config import Deployment, load, parse
from afd.errors import ConfigError

ROOT = Path(__file__).parents[2]
LOCAL = ROOT / "deploy" / "local.yaml"


def keys(data: dict[str, Any], prefix: str = "") -> set[str]:
    """Dotted names of all settings; a free-form mapping is one setting."""
    found: set[str] = set()
    for name, value in data.items():
        free_form = f"{prefix}{name}".endswith("custom")
        found |= keys(value, f"{prefix}{name}.") if isinstance(value, dict) and not free_form else {f"{prefix}{name}"}
    return found


def test_the_documented_file_names_every_setting_with_its_default() -> None:
    assert load(LOCAL) == Deployment()
    assert keys(yaml.safe_load(LOCAL.read_text())) == keys(Deployment().model_dump())


def test_no_file_and_an_empty_file_give_the_defaults(tmp_path: Path) -> None:
    empty = tmp_path / "empty.yaml"
    empty.write_text("")
    assert load(None) == load(empty) == Deployment()


def test_an_unknown_key_is_refused_with_the_place_where_it_belongs(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("microbatches: 2\n")
    with pytest.raises(ConfigError, match=r"mine.yaml: unknown key microbatches \(did you mean attention.microbatches"):
        load(file)
    with pytest.raises(ConfigError, match=r"unknown key ffn.shard.* ffn.sharding\?"):
        parse({"ffn": {"shard": "ep"}}, "test")
    with pytest.raises(ConfigError, match=r"unknown key threads \(did you mean attention.threads or ffn.threads\?\)"):
        parse({"threads": 2}, "test")
    with pytest.raises(ConfigError, match="unknown key zzz; known are model, topology"):
        parse({"zzz": 1}, "test")


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        ({"attention": {"microbatches": 0}}, "attention.microbatches is 0: .*greater than or equal to 1"),
        ({"attention": {"microbatches": "3"}}, "attention.microbatches is '3': .*integer"),
        ({"router": {"port": 70000}}, "router.port is 70000: .*65535"),
        (
            {"transport": {"kind": "rdma"}},
            "transport.kind is 'rdma': .*'auto', 'shm', 'grpc', 'inproc' or 'collective'",
        ),
        ({"topology": "2"}, "topology is '2': .*like 2A1F"),
        ({"ffn": 3}, "ffn is 3"),
        ({"attention": {"threads": 0}}, "attention.threads is 0: .*equal to 1; attention.threads is 0: .*'auto'"),
        ({"ffn": {"threads": -2}}, "ffn.threads is -2: .*greater than or equal to 1"),
        ({"attention": {"max_context": 0}}, "attention.max_context is 0: .*greater than or equal to 1"),
        ({"attention": {"kv_cache_gib": 0.0}}, "attention.kv_cache_gib is 0.0: .*greater than 0"),
        ({"attention": {"kv_cache_gib": float("nan")}}, "attention.kv_cache_gib is nan: .*finite"),
        ({"attention": {"kv_cache_gib": float("inf")}}, "attention.kv_cache_gib is inf: .*finite"),
        ({"attention": {"resources": {"num_cpus": float("inf")}}}, "attention.resources.num_cpus is inf: .*finite"),
        ({"ffn": {"resources": {"custom": {"fast": -1.0}}}}, "ffn.resources.custom.fast is -1.0: .*equal to 0"),
        ({"ffn": {"resources": {"custom": {"fast": float("nan")}}}}, "ffn.resources.custom.fast is nan"),
        (
            {"transport": {"bind": "node"}, "cluster": {"backend": "local"}},
            "transport.bind is 'node', .*, but cluster.backend is 'local': give the address itself",
        ),
        ({"transport": {"bind": ""}}, "transport.bind is '': .*at least 1 character"),
        ({"transport": {"connect_s": float("inf")}}, "transport.connect_s is inf: .*finite"),
        ({"router": {"drain_s": float("nan")}}, "router.drain_s is nan"),
        ({"router": {"cors_origins": ["page.example"]}}, "router.cors_origins is .*like https://example.org"),
        ({"router": {"cors_origins": ["https://a.b/path"]}}, "router.cors_origins is .*without a path"),
        ({"router": {"otlp_endpoint": "collector:4318"}}, "router.otlp_endpoint is 'collector:4318': .*must be a URL"),
        ({"router": {"prices": {"ffn": 1.0}}}, "router.prices is .*both roles"),
        ({"router": {"log_format": "xml"}}, "router.log_format is 'xml': .*'text' or 'json'"),
        ({"router": {"max_body_mib": 0}}, "router.max_body_mib is 0: .*greater than 0"),
        ({"ffn": {"tp": 2}}, "ffn is .*: tp 2 is the TP degree of hybrid sharding, but sharding is ep"),
    ],
)
def test_a_wrong_value_is_refused_with_key_value_and_limit(data: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=f"^test: {sentence}"):
        parse(data, "test")


def test_everything_wrong_is_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        parse({"dtype": "fp8", "router": {"drain_s": -1.0}, "nonsense": 1}, "test")
    assert all(word in str(caught.value) for word in ("dtype", "router.drain_s", "nonsense"))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [("a: [1", "is not YAML"), ("- 1\n- 2\n", "holds a list, not a mapping"), ("\xff", "is not YAML")],
)
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str, sentence: str) -> None:
    file = tmp_path / "bad.yaml"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=f"{re.escape(str(file))} {sentence}"):
        load(file)


def test_a_missing_file_is_refused_with_its_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the deployment file .*none.yaml: No such file"):
        load(tmp_path / "none.yaml")


def test_flags_override_the_file_and_unset_ones_leave_it() -> None:
    file = parse({"topology": "2A1F", "attention": {"microbatches": 2}}, "test")
    laid = file.with_flags({"attention.microbatches": 1, "router.port": 0, "topology": None})
    assert (laid.topology, laid.attention.microbatches, laid.router.port) == ("2A1F", 1, 0)
    assert file.attention.microbatches == 2, "the original stays as it was"


def test_a_wrong_flag_is_refused_as_the_command_lines() -> None:
    with pytest.raises(ConfigError, match=r"^the command line: router.port is -1"):
        Deployment().with_flags({"router.port": -1})


def test_a_deployment_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Deployment().attention.microbatches = 1  # type: ignore[misc]


def test_constraints_pin_every_direct_dependency() -> None:
    """As text: tomllib is not in Python 3.10."""
    project = (ROOT / "pyproject.toml").read_text()
    lists = re.findall(r"^(?:dependencies|ray|dev) = \[(.*?)\]", project, re.MULTILINE | re.DOTALL)
    wanted = {name.lower() for text in lists for name in re.findall(r'"([\w.-]+)', text)}
    pinned = re.findall(r"^([\w.-]+)==", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert wanted == set(pinned)
    assert len(wanted) > 20
