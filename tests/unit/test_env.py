from __future__ import annotations

import re
from pathlib import Path

import pytest

from afd import env
from afd.errors import ConfigError


def test_an_empty_environment_gives_the_defaults() -> None:
    assert env.read({}) == env.Environment(cache=Path.home() / ".cache" / "afd", log_level="info", kernels="auto")


def test_known_variables_are_read_and_others_without_the_prefix_ignored() -> None:
    read = env.read({"AFD_CACHE": "~/models", "AFD_LOG": "DEBUG", "PATH": "/bin"})
    assert read == env.Environment(cache=Path.home() / "models", log_level="debug", kernels="auto")


def test_an_unknown_variable_is_refused_with_the_known_ones() -> None:
    known = "AFD_API_KEYS, AFD_CACHE, AFD_CLUSTER_TOKEN, AFD_KERNELS, AFD_LOG, AFD_LOG_FORMAT"
    with pytest.raises(ConfigError, match=f"unknown environment variable AFD_LOGS; known are {known}"):
        env.read({"AFD_LOGS": "debug"})


def test_a_bad_value_is_refused_with_the_choices() -> None:
    with pytest.raises(ConfigError, match="AFD_KERNELS is 'fast'; choose one of auto, native, plain"):
        env.read({"AFD_KERNELS": "fast"})
    with pytest.raises(ConfigError, match="AFD_LOG is 'loud'; choose one of debug, info, warning, error"):
        env.read({"AFD_LOG": "loud"})
    with pytest.raises(ConfigError, match="AFD_LOG_FORMAT is 'xml'; choose one of text, json"):
        env.read({"AFD_LOG_FORMAT": "xml"})


def test_the_deployment_guide_lists_every_variable() -> None:
    guide = (Path(__file__).parents[2] / "deploy" / "README.md").read_text()
    listed = re.findall(r"^\| `(AFD_[A-Z_]+)` \| \S", guide, re.M)
    assert listed == sorted(env.KNOWN)
    for choices in (env.KERNELS, env.LOG_LEVELS, env.LOG_FORMATS):
        assert all(f"`{choice}`" in guide for choice in choices)
