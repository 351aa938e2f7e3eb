from __future__ import annotations

import os
from pathlib import Path

import pytest

from afd import credentials, env
from afd.config import Deployment, TlsSection
from afd.credentials import Credentials, for_run
from afd.errors import ConfigError
from tests import certificates

TOKEN = "sixteen-visible-characters"


def with_file(tmp_path: Path, text: str = f"{TOKEN}\n") -> Deployment:
    (tmp_path / "token").write_text(text)
    return Deployment().with_flags({"transport.token_file": str(tmp_path / "token")})


def test_every_run_has_a_token_of_its_own() -> None:
    tokens = {for_run(Deployment()).token for _ in range(10)}
    assert len(tokens) == 10
    assert all(len(token) >= 43 and credentials.parse(token, "here") == token for token in tokens)  # 256 bits


def test_a_users_token_comes_from_a_file_or_the_environment(tmp_path: Path) -> None:
    assert for_run(with_file(tmp_path)).token == TOKEN
    assert for_run(with_file(tmp_path), TOKEN).token == TOKEN
    assert for_run(Deployment(), env.read({"AFD_CLUSTER_TOKEN": f" {TOKEN}\n"}).cluster_token).token == TOKEN
    with pytest.raises(ConfigError, match=r"\(transport.token_file\) and AFD_CLUSTER_TOKEN differ"):
        for_run(with_file(tmp_path), TOKEN + "!")


@pytest.mark.parametrize(
    ("token", "said"),
    [
        ("", "has at least 16 characters, this one 0"),
        ("fifteen-letters", "has at least 16 characters, this one 15"),
        ("two words of a token", "visible ASCII on one line"),
        ("two-lines-of-tokens\nand-another-one", "visible ASCII on one line"),
        ("a-tökèn-of-the-cluster", "visible ASCII on one line"),
    ],
)
def test_a_token_that_is_none_is_refused_and_not_shown(tmp_path: Path, token: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        env.read({"AFD_CLUSTER_TOKEN": token})
    assert str(caught.value).startswith("AFD_CLUSTER_TOKEN: ")
    with pytest.raises(ConfigError, match=f"{said}") as in_file:
        for_run(with_file(tmp_path, token))
    assert str(in_file.value).startswith(f"{tmp_path}/token (transport.token_file): ")
    assert not token or token not in f"{caught.value} {in_file.value}"


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"{tmp_path}/none \(transport.token_file\): No such file or directory"):
        for_run(Deployment().with_flags({"transport.token_file": str(tmp_path / "none")}))
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="it is not UTF-8 text"):
        credentials.read(tmp_path / "binary")


def test_no_secret_shows_in_what_is_printed_of_it() -> None:
    held = Credentials(TOKEN)
    assert TOKEN not in f"{held!r} {held} {env.read({'AFD_CLUSTER_TOKEN': TOKEN})!r}"


def test_children_inherit_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in env.SECRET:
        monkeypatch.setenv(name, TOKEN)
    monkeypatch.setenv("AFD_LOG", "debug")
    inherited = env.for_children()
    assert inherited["AFD_LOG"] == "debug"
    assert not env.SECRET & inherited.keys()
    with env.without_secrets():
        assert not env.SECRET & os.environ.keys()
    assert os.environ.keys() >= env.SECRET


def test_certificates_are_read_before_anything_starts(tmp_path: Path) -> None:
    ours = certificates.authority(tmp_path, "ours")
    good, other = ours.gives("good", "IP:127.0.0.1"), ours.gives("other", "IP:127.0.0.1")
    (tmp_path / "nonsense").write_text("nonsense")

    def refusal(**changes: str) -> str:
        tls = good.model_copy(update=changes)
        with pytest.raises(ConfigError) as caught:
            for_run(Deployment().with_flags({"transport.tls": tls.model_dump()}))
        return str(caught.value)

    assert for_run(Deployment().with_flags({"transport.tls": good.model_dump()})).tls == good
    assert refusal(cert="/none.pem") == "cannot read /none.pem (transport.tls.cert): No such file or directory"
    assert "are not a certificate and its key, in PEM" in refusal(key=other.key)
    assert "are not a certificate and its key, in PEM" in refusal(cert=str(tmp_path / "nonsense"))
    assert refusal(ca=str(tmp_path / "nonsense")).endswith("(transport.tls.ca) holds no certificate in PEM")
    assert "KEY" not in repr(credentials.read_pem(good))


def test_tls_is_for_grpc_and_all_of_it_must_be_there() -> None:
    tls = TlsSection(cert="c", key="k", ca="a").model_dump()
    with pytest.raises(ConfigError, match="tls is gRPC's; kind collective would send activations in plain text"):
        Deployment().with_flags({"transport.kind": "collective", "transport.tls": tls})
    with pytest.raises(ConfigError, match=r"transport\.tls\.key"):
        Deployment().with_flags({"transport.tls": {"cert": "c", "ca": "a"}})
    with pytest.raises(ConfigError, match=r"unknown key transport\.tls\.crt"):
        Deployment().with_flags({"transport.tls": {**tls, "crt": "c"}})
