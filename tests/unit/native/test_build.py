"""Where kernels cannot be compiled, plain torch serves, and says why; insisting on them is an error."""

from __future__ import annotations

import logging
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from afd.errors import ConfigError
from afd.native import build, library

needs_compiler = pytest.mark.skipif(library.load() is None, reason="no C++ compiler, or AFD_KERNELS=plain")


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "load", library.load.__wrapped__)


def test_without_a_compiler_one_sentence_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("AFD_KERNELS", "auto")
    with caplog.at_level(logging.WARNING):
        assert library.load() is None
    assert "plain torch" in caplog.text
    assert "no C++ compiler was found" in caplog.text
    monkeypatch.setenv("AFD_KERNELS", "native")
    with pytest.raises(ConfigError, match=r"AFD_KERNELS is native, but.*no C\+\+ compiler"):
        library.load()


def test_plain_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AFD_KERNELS", "plain")
    assert library.load() is None


def test_a_compiler_that_fails_is_quoted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "broken-c++"
    broken.write_text('#!/bin/sh\n[ "$1" = --version ] && exit 0\necho "fatal: out of ideas" >&2\nexit 1\n')
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    monkeypatch.setenv("AFD_CACHE", str(tmp_path / "cache"))
    with pytest.raises(build.NoCompiler, match="broken-c\\+\\+ failed: fatal: out of ideas"):
        build.library()
    assert not list((tmp_path / "cache" / "native").glob("*.so"))


def test_a_folder_that_cannot_be_written_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file, not a folder")
    monkeypatch.setenv("AFD_CACHE", str(tmp_path / "cache"))
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    with pytest.raises(build.NoCompiler, match=r"cache.*cannot be written.*AFD_CACHE moves it"):
        build.library()


@needs_compiler
def test_several_that_start_at_once_compile_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiled: list[Path] = []
    monkeypatch.setenv("AFD_CACHE", str(tmp_path))
    monkeypatch.setattr(build, "_compile", lambda _, path: (compiled.append(path), path.touch()))
    with ThreadPoolExecutor(4) as pool:
        paths = list(pool.map(lambda _: build.library(), range(4)))
    assert len(compiled) == 1
    assert set(paths) == set(compiled)
