"""Compiles the kernels in `src/` for this very machine, once: the library lies in the cache folder under a name made of
its sources, flags, compiler and CPU.

    python -m afd.native.build      # compile now rather than at the first start
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from afd import env

SOURCES = Path(__file__).parent / "src"
FLAGS = ("-std=c++20", "-O3", "-march=native", "-ffp-contract=fast", "-fPIC", "-shared", "-fvisibility=hidden", "-w")
OPENMP = "-fopenmp"
COMPILE_S = 300.0


class NoCompiler(Exception):
    """The kernels cannot be compiled here; the text is a sentence that says why."""


def library() -> Path:
    """The compiled library's path; compiles it if need be (about ten seconds). Processes that ask at the same time
    wait for the one that compiles. Raises NoCompiler."""
    compiler = _compiler()
    folder = env.read().cache / "native"
    path = folder / f"kernels-{_fingerprint(compiler)}.so"
    if path.exists():
        return path
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():
                _compile(compiler, path)
    except OSError as error:
        raise NoCompiler(f"{folder} cannot be written: {error.strerror or error}; AFD_CACHE moves it") from error
    return path


def _compiler() -> str:
    for name in (os.environ.get("CXX"), "g++", "c++", "clang++"):
        if name and (found := shutil.which(name)):
            return found
    raise NoCompiler("no C++ compiler was found (g++, c++, clang++; the variable CXX names another)")


def _fingerprint(compiler: str) -> str:
    """Everything that the library's code depends on."""
    digest = hashlib.sha256(" ".join((compiler, *FLAGS)).encode())
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.read_bytes())
    digest.update(_output([compiler, "--version"]).encode())
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else [platform.processor()]
    digest.update(next((line for line in lines if line.startswith(("flags", "Features"))), lines[0]).encode())
    return digest.hexdigest()[:16]


def _compile(compiler: str, path: Path) -> None:
    handle, name = tempfile.mkstemp(suffix=".so", dir=path.parent)
    os.close(handle)
    try:
        try:
            _output([compiler, *FLAGS, OPENMP, str(SOURCES / "kernels.cpp"), "-o", name])
        except NoCompiler:  # a compiler without OpenMP: one thread per worker
            _output([compiler, *FLAGS, str(SOURCES / "kernels.cpp"), "-o", name])
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


def _output(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NoCompiler(f"{command[0]} cannot be run: {error}") from error
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["nothing said"])[0]
        raise NoCompiler(f"{command[0]} failed: {last}")
    return done.stdout


if __name__ == "__main__":
    try:
        print(library())
    except NoCompiler as reason:
        print(f"plain torch will be used: {reason}", file=sys.stderr)
