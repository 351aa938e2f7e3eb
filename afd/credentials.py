"""What workers and routers must show one another: the cluster's token, and certificates where there are some.

Each run has a token. Who starts the cluster makes it, unless the user gives one, and hands it to workers and routers
with their other arguments: through a socket that only parent and child have, or as an argument of a Ray actor. So it
stands on no command line, in no file of ours and in no child's environment. It is never logged, and no error shows it.
"""

from __future__ import annotations

import secrets
import ssl
from dataclasses import dataclass, field
from pathlib import Path

from afd.config import Deployment, TlsSection
from afd.errors import ConfigError

LEAST_CHARS = 16  # of a token; what is shorter can be guessed


@dataclass(frozen=True, slots=True)
class Credentials:
    """`token` "": nobody is asked for one, which is refused wherever other machines can connect. `tls`: None is plain
    gRPC."""

    token: str = field(default="", repr=False)
    tls: TlsSection | None = None


OPEN = Credentials()


@dataclass(frozen=True, slots=True)
class Pem:
    """The files of transport.tls, read."""

    cert: bytes
    key: bytes = field(repr=False)
    ca: bytes


def for_run(deployment: Deployment, given: str = "") -> Credentials:
    """Of one run of `deployment`: with the token of transport.token_file, else `given` (the environment's), else a new
    one. Raises ConfigError when a file cannot be read or holds something else, or the two tokens differ."""
    transport = deployment.transport
    if transport.tls is not None:
        read_pem(transport.tls)
    in_file = "" if transport.token_file is None else read(Path(transport.token_file).expanduser())
    if in_file and given and in_file != given:
        raise ConfigError(f"{transport.token_file} (transport.token_file) and AFD_CLUSTER_TOKEN differ; leave one out")
    return Credentials(in_file or given or secrets.token_urlsafe(32), transport.tls)


def read(file: Path) -> str:
    """The token in `file`. Raises ConfigError."""
    try:
        text = file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigError(f"cannot read the cluster token in {file} (transport.token_file): {reason}") from error
    return parse(text, f"{file} (transport.token_file)")


def parse(text: str, source: str) -> str:
    """The token, without the space around it. Raises ConfigError naming `source`, and not showing what it holds."""
    token = text.strip()
    if not all("!" <= char <= "~" for char in token):
        raise ConfigError(f"{source}: a cluster token is visible ASCII on one line; this one holds something else")
    if len(token) < LEAST_CHARS:
        raise ConfigError(f"{source}: a cluster token has at least {LEAST_CHARS} characters, this one {len(token)}")
    return token


def read_pem(tls: TlsSection) -> Pem:
    """Certificate, key and authority, once it is known that they are such. Raises ConfigError."""
    cert, key, ca = (Path(text).expanduser() for text in (tls.cert, tls.key, tls.ca))
    found = Pem(_bytes(cert, "cert"), _bytes(key, "key"), _bytes(ca, "ca"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(cert, key, password=lambda: "")  # else it would ask the terminal for one
    except (ssl.SSLError, ValueError) as error:
        raise ConfigError(
            f"{cert} and {key} (transport.tls) are not a certificate and its key, in PEM and without a password"
        ) from error
    try:
        context.load_verify_locations(ca)
    except ssl.SSLError as error:
        raise ConfigError(f"{ca} (transport.tls.ca) holds no certificate in PEM") from error
    return found


def _bytes(path: Path, name: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {path} (transport.tls.{name}): {error.strerror}") from error
