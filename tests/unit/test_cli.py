"""The command line from the outside: what it prints, where, and its exit codes."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from afd import cli
from afd.models import registry
from afd.spec import from_config
from afd.weights import dummy, library
from afd.weights.prepare import GGUF_NAME, wheel_gguf

ROOT = Path(__file__).parents[2]
VIEW = {
    "epoch": 7,
    "model": "toy",
    "topology": "1A1F",
    "problem": "ffn_rank 0 (pid 11) exited with signal 9",
    "workers": [
        {"role": "ffn", "rank": 0, "state": "lost", "address": "", "pid": 11, "node": "n", "message": "exited with 9"},
        {
            "role": "attention",
            "rank": 0,
            "state": "ready",
            "address": "h:1",
            "pid": 12,
            "node": "n",
            "message": "",
            "status": {"running": 3},
        },
    ],
}


class Router(BaseHTTPRequestHandler):
    """Speaks just enough of the API; what it was asked is kept in `bodies`."""

    bodies: list[dict[str, object]]
    answer: list[str]

    def do_GET(self) -> None:
        replies: dict[str, object] = {"/v1/models": {"data": [{"id": "toy"}]}, "/status": VIEW}
        self._reply(200, json.dumps(replies[self.path]))

    def do_POST(self) -> None:
        self.bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        if self.answer[0].startswith("refuse"):
            self._reply(400, json.dumps({"error": {"message": "the prompt is too long"}}))
        else:
            self._reply(200, "".join(f"data: {line}\n\n" for line in self.answer))

    def _reply(self, status: int, body: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, format: str, *args: object) -> None:
        pass


def piece(text: str) -> str:
    return json.dumps({"choices": [{"delta": {"content": text}}]})


@pytest.fixture
def router() -> Iterator[tuple[type[Router], str]]:
    handler = type("Scripted", (Router,), {"bodies": [], "answer": [piece("Par"), piece("is."), "[DONE]"]})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield handler, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def afd(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Runs the command in this process; its exit code."""
    monkeypatch.setattr(sys, "argv", ["afd", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


Capture = pytest.CaptureFixture[str]
Monkey = pytest.MonkeyPatch


def test_the_command_line_itself_loads_nothing_heavy() -> None:
    heavy = "{'torch', 'ray', 'grpc', 'httpx', 'transformers', 'fastapi'}"
    check = f"import afd.cli, sys; sys.exit(', '.join({heavy} & set(sys.modules)) or None)"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_a_user_error_is_one_sentence_on_standard_error_and_exit_code_2(monkeypatch: Monkey, capsys: Capture) -> None:
    assert afd(monkeypatch, "serve", "--model", "nosuch") == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: unknown model 'nosuch'; known are smollm2")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["serve", "--topology", "0A1F"], "like 2A1F"),
        (["serve", "--transport", "rdma"], "the command line: transport.kind is 'rdma'"),
        (["serve", "--microbatches", "0"], "attention.microbatches is 0"),
        (["serve", "--ffn-sharding", "pp"], "ffn.sharding is 'pp'"),
        (["serve", "none.yaml"], "cannot read the deployment file none.yaml"),
        (["serve", "--bogus"], "No such option"),
        (["fly"], "No such command"),
        (["model", "prepare", "nosuch"], "unknown model 'nosuch'"),
        (["model", "info", "nosuch"], "unknown model 'nosuch'"),
        (["status", "--url", "http://127.0.0.1:1"], "nothing answers at http://127.0.0.1:1"),
        (["chat", "hi", "--url", "http://127.0.0.1:1"], "nothing answers at http://127.0.0.1:1"),
        (["chat", "hi", "--url", "not a url"], "not a url"),
    ],
)
def test_what_is_wrong_is_named(arguments: list[str], sentence: str, monkeypatch: Monkey, capsys: Capture) -> None:
    assert afd(monkeypatch, *arguments) == 2
    assert sentence in " ".join(capsys.readouterr().err.split())


def test_an_unknown_variable_of_ours_stops_the_server(monkeypatch: Monkey, capsys: Capture) -> None:
    monkeypatch.setenv("AFD_LOGS", "debug")
    assert afd(monkeypatch, "serve") == 2
    assert "unknown environment variable AFD_LOGS" in capsys.readouterr().err


def test_an_unknown_key_of_the_file_is_told_with_its_place(
    tmp_path: Path, monkeypatch: Monkey, capsys: Capture
) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("microbatches: 2\n")
    assert afd(monkeypatch, "serve", str(file)) == 2
    assert "did you mean attention.microbatches" in " ".join(capsys.readouterr().err.split())


def test_chat_streams_an_answer_to_standard_output(
    router: tuple[type[Router], str], monkeypatch: Monkey, capsys: Capture
) -> None:
    handler, url = router
    assert afd(monkeypatch, "chat", "Capital of France?", "--url", url) == 0
    assert capsys.readouterr().out == "Paris.\n"
    assert handler.bodies[0]["messages"] == [{"role": "user", "content": "Capital of France?"}]
    assert handler.bodies[0]["model"] == "toy"


def test_a_conversation_carries_its_history_and_ends_with_the_input(
    router: tuple[type[Router], str], monkeypatch: Monkey, capsys: Capture
) -> None:
    handler, url = router
    lines = iter(["one", "", "two"])

    def next_line(prompt: str) -> str:
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", next_line)
    assert afd(monkeypatch, "chat", "--url", url) == 0
    said = [message["content"] for message in handler.bodies[1]["messages"]]  # type: ignore[attr-defined]
    assert said == ["one", "Paris.", "two"]
    assert len(handler.bodies) == 2


def test_a_refused_or_broken_answer_is_an_error_with_the_routers_sentence(
    router: tuple[type[Router], str], monkeypatch: Monkey, capsys: Capture
) -> None:
    handler, url = router
    for answer, sentence in [
        (["refuse"], "the prompt is too long (HTTP 400)"),
        ([piece("Pa"), json.dumps({"error": {"message": "ffn_rank 0 is gone"}})], "ffn_rank 0 is gone"),
        ([piece("Pa")], "the server ended the answer in the middle"),
    ]:
        handler.answer = answer
        assert afd(monkeypatch, "chat", "hi", "--url", url) == 2
        assert f"error: {sentence}" in capsys.readouterr().err


def test_status_shows_every_worker_and_the_problem(
    router: tuple[type[Router], str], monkeypatch: Monkey, capsys: Capture
) -> None:
    assert afd(monkeypatch, "status", "--url", router[1]) == 0
    out = capsys.readouterr().out
    for text in ("toy as 1A1F", "ffn_rank 0 (pid 11) exited with signal 9", "attention_rank 0", "lost", "running 3"):
        assert text in out
    assert afd(monkeypatch, "status", "--json", "--url", router[1]) == 0
    assert json.loads(capsys.readouterr().out) == VIEW


@pytest.mark.parametrize("reply", ["<html>hello</html>", "[]", "{}", '{"data": [], "workers": [3]}'])
@pytest.mark.parametrize("command", [["status"], ["status", "--json"], ["chat", "hi"]])
def test_a_server_that_is_none_of_ours_is_one_sentence(
    router: tuple[type[Router], str], command: list[str], reply: str, monkeypatch: Monkey, capsys: Capture
) -> None:
    handler, url = router
    monkeypatch.setattr(handler, "do_GET", lambda self: self._reply(200, reply))
    assert afd(monkeypatch, *command, "--url", url) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: http://127.0.0.1:")
    assert "answers, but not as `afd serve` does" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("event", ["not json", "[]", '{"choices": 3}', '{"error": 3}'])
def test_an_answer_that_is_no_event_of_ours_is_one_sentence(
    router: tuple[type[Router], str], event: str, monkeypatch: Monkey, capsys: Capture
) -> None:
    router[0].answer = [event]
    assert afd(monkeypatch, "chat", "hi", "--url", router[1]) == 2
    assert "answers, but not as `afd serve` does" in capsys.readouterr().err


def test_status_shows_a_workers_message_as_it_is(
    router: tuple[type[Router], str], monkeypatch: Monkey, capsys: Capture
) -> None:
    said = "[red]no[/bold]"
    view = {**VIEW, "workers": [{**VIEW["workers"][0], "message": said}]}  # type: ignore[index]
    monkeypatch.setattr(router[0], "do_GET", lambda self: self._reply(200, json.dumps(view)))
    assert afd(monkeypatch, "status", "--url", router[1]) == 0
    assert said in capsys.readouterr().out


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder with a random two-layer qwen3_moe model of 4 experts."""
    config = {
        "model_type": "qwen3_moe",
        "architectures": ["Qwen3MoeForCausalLM"],
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "intermediate_size": 48,
        "moe_intermediate_size": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "vocab_size": 64,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
    }
    spec = from_config(config)
    return dummy.write_checkpoint(tmp_path / "tiny-moe", config, registry.family(spec.family).tensors(spec), seed=1)


def test_model_info_shares_the_model_out_completely(model: Path, monkeypatch: Monkey, capsys: Capture) -> None:
    shown = ["model", "info", str(model), "--topology", "2A2F", "--dtype", "fp32"]
    assert afd(monkeypatch, *shown, "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    workers = {(w["role"], w["rank"]): w for w in facts["workers"]}
    assert sorted(workers) == [("attention", 0), ("attention", 1), ("ffn", 0), ("ffn", 1)]
    assert facts["kv_bytes_per_token"] == 2 * 2 * 2 * 8 * 4  # layers, k and v, heads, head_dim, bytes
    expert = 3 * 32 * 16
    assert workers["ffn", 0]["parameters"] == workers["ffn", 1]["parameters"] == 2 * 2 * expert
    files = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    held = sum(workers[key]["nbytes"] for key in [("attention", 0), ("ffn", 0), ("ffn", 1)])
    assert held <= files < held + 10_000  # the files' headers
    assert afd(monkeypatch, *shown) == 0
    assert "tiny-moe (qwen3_moe): 2 layers, 4 experts" in capsys.readouterr().out


def test_a_chat_template_that_is_no_text_is_refused(model: Path, monkeypatch: Monkey, capsys: Capture) -> None:
    (model / "chat_template.jinja").write_bytes(b"\xff\xfe")
    assert afd(monkeypatch, "model", "info", str(model)) == 2
    assert "chat_template.jinja is not readable UTF-8" in " ".join(capsys.readouterr().err.split())


def test_a_topology_the_experts_do_not_divide_into_is_refused(
    model: Path, monkeypatch: Monkey, capsys: Capture
) -> None:
    for command in (["model", "info", str(model)], ["serve", "--model", str(model)]):
        assert afd(monkeypatch, *command, "--topology", "1A3F") == 2
        assert "4 experts do not divide over 3 EP groups" in " ".join(capsys.readouterr().err.split())


def test_a_model_without_a_tokenizer_cannot_be_served(model: Path, monkeypatch: Monkey, capsys: Capture) -> None:
    assert afd(monkeypatch, "serve", "--model", str(model)) == 2
    assert "has no tokenizer.json" in capsys.readouterr().err


def test_model_list_names_the_known_models(monkeypatch: Monkey, capsys: Capture) -> None:
    assert afd(monkeypatch, "model", "list") == 0
    out = capsys.readouterr().out
    assert "smollm2" in out
    assert "smollm2-step3" in out


def test_setup_says_what_is_missing_when_no_whole_environment_can_be_made(tmp_path: Path) -> None:
    """A Python without ensurepip leaves an environment without pip; that one must not count as made, either."""
    for name in ("scripts/setup", "constraints.txt", "pyproject.toml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/sh\n[ "$1$2" = -mvenv ] || exec {sys.executable} "$@"\n'
        f"{sys.executable} -m venv --without-pip {tmp_path}/.venv\nexit 1\n"
    )
    python.chmod(0o755)
    for _ in range(2):
        command, environment = [str(tmp_path / "scripts" / "setup"), "ray"], {**os.environ, "PYTHON": str(python)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 2
        assert "needs the package python3-venv" in done.stderr


@pytest.mark.smollm2
def test_preparing_again_reads_every_file_against_its_checksum(
    tmp_path: Path, monkeypatch: Monkey, capsys: Capture
) -> None:
    monkeypatch.setenv("AFD_CACHE", str(tmp_path))
    assert afd(monkeypatch, "model", "prepare", "smollm2") == 0
    gguf = library.folder("smollm2") / GGUF_NAME
    assert not gguf.samefile(wheel_gguf()), "a link would let a change here reach the wheel"
    assert afd(monkeypatch, "model", "prepare", "smollm2") == 0
    assert "every file has its checksum" in capsys.readouterr().out
    with gguf.open("r+b") as file:
        file.seek(50_000_000)
        file.write(b"changed")
    assert afd(monkeypatch, "model", "prepare", "smollm2") == 2
    assert "has changed since; run `afd model prepare --force smollm2`" in " ".join(capsys.readouterr().err.split())


def test_waiting_for_another_preparation_is_told_and_can_be_interrupted(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    with (tmp_path / "models" / ".smollm2.lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        code = (
            "from afd.weights.prepare import prepare\n"
            "prepare('smollm2', lambda done, total, what: print(what, flush=True))"
        )
        environment = {**os.environ, "AFD_CACHE": str(tmp_path)}
        with subprocess.Popen(
            [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as waiting:
            assert waiting.stdout is not None
            assert waiting.stdout.readline() == "waiting for another preparation\n"
            waiting.send_signal(signal.SIGINT)
            _, err = waiting.communicate(timeout=20)
    assert "KeyboardInterrupt" in err
