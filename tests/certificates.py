"""Authorities and the certificates they give, made by the openssl command."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from afd.config import TlsSection

_NEW_KEY = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]


@dataclass(frozen=True)
class Authority:
    """Its own certificate is `ca`; both files lie in `folder`."""

    folder: Path
    name: str

    @property
    def ca(self) -> str:
        return str(self.folder / f"{self.name}.pem")

    def gives(self, name: str, holder: str, *, ca: str | None = None, expects: str | None = None) -> TlsSection:
        """A certificate for `holder`, such as "IP:127.0.0.1". `ca`: another authority's, for one who trusts that;
        `expects`: the name that its peers must have."""
        key, request, cert = (str(self.folder / f"{name}.{kind}") for kind in ("key", "csr", "pem"))
        extensions = self.folder / f"{name}.ext"
        extensions.write_text(f"subjectAltName={holder}")
        _openssl("req", *_NEW_KEY, "-keyout", key, "-out", request, "-subj", f"/CN={name}")
        signed = ["-CA", self.ca, "-CAkey", str(self.folder / f"{self.name}.key"), "-CAcreateserial"]
        _openssl("x509", "-req", "-in", request, *signed, "-out", cert, "-days", "2", "-extfile", str(extensions))
        return TlsSection(cert=cert, key=key, ca=ca or self.ca, name=expects)


def authority(folder: Path, name: str) -> Authority:
    made = Authority(folder, name)
    _openssl(
        "req",
        "-x509",
        *_NEW_KEY,
        "-keyout",
        f"{folder}/{name}.key",
        "-out",
        made.ca,
        "-days",
        "2",
        "-subj",
        f"/CN={name}",
    )
    return made


def _openssl(*arguments: str) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("there is no openssl command to make certificates with")
    subprocess.run(["openssl", *arguments], check=True, capture_output=True, timeout=60)
