from __future__ import annotations

from pathlib import Path

import pytest

from afd import api_keys, env
from afd.commands import http
from afd.errors import ConfigError


def test_a_file_has_a_key_a_line_and_comments(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# of the team\nfirst \n\n  second\nfirst\n")
    assert api_keys.read(file) == ("first", "second")


def test_the_environment_has_keys_between_commas_and_does_not_show_them() -> None:
    read = env.read({"AFD_API_KEYS": "first, second"})
    assert read.api_keys == ("first", "second")
    assert "first" not in repr(read)
    assert env.read({}).api_keys == ()


@pytest.mark.parametrize("text", ["", "# only this\n", " \n"])
def test_a_file_without_keys_is_refused_for_it_would_leave_the_door_open(tmp_path: Path, text: str) -> None:
    file = tmp_path / "keys"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"keys \(router.api_keys_file\) holds no API key"):
        api_keys.read(file)
    with pytest.raises(ConfigError, match="AFD_API_KEYS holds no API key"):
        env.read({"AFD_API_KEYS": " , "})


def test_a_key_that_no_header_carries_is_refused_by_its_place_and_not_shown(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("good\nmy secret\n")
    with pytest.raises(ConfigError, match="key 2 holds a character") as caught:
        api_keys.read(file)
    assert "secret" not in str(caught.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none \(router.api_keys_file\): No such file"):
        api_keys.read(tmp_path / "none")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="UTF-8"):
        api_keys.read(tmp_path / "bytes")


def test_commands_send_the_first_key_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AFD_API_KEYS", "first,second")
    with http.client("http://127.0.0.1:1") as session:
        assert session.headers["Authorization"] == "Bearer first"
    monkeypatch.delenv("AFD_API_KEYS")
    with http.client("http://127.0.0.1:1") as session:
        assert "Authorization" not in session.headers
