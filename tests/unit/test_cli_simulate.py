"""`afd simulate`: words in, figures and a trace out."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from afd import cli
from tests.chrome_trace import check

Monkey = pytest.MonkeyPatch
Capture = pytest.CaptureFixture[str]

STEP3 = ("--model", "step3", "--hardware", "A:H20,F:H800", "--topology", "2A2F", "--batch", "96", "--steps", "3",
         "--cards-per-worker", "8")  # fmt: skip


def simulate(monkeypatch: Monkey, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["afd", "simulate", *arguments])
    try:
        cli.main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_json_has_every_figure(monkeypatch: Monkey, capsys: Capture) -> None:
    assert simulate(monkeypatch, *STEP3, "--microbatches", "3", "--jitter", "0.1", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tokens"] == found["tokens_wanted"] == 96 * 3
    assert found["cards"] == 32
    assert found["tokens_per_s_per_card"] == pytest.approx(found["tokens_per_s"] / 32)
    assert set(found["tpot_s"]) == {"mean", "p50", "p90", "p99"}
    assert set(found["timeline"]["bubbles"]) == {"attention", "ffn"}


def test_people_get_tables_and_perfetto_a_trace(monkeypatch: Monkey, capsys: Capture, tmp_path: Path) -> None:
    trace = tmp_path / "trace.json"
    disturbed = ("--straggler", "attention:1x2", "--fault", "ffn:0@0.01+0.02", "--trace-from", "0")
    assert simulate(monkeypatch, *STEP3, *disturbed, "-o", str(trace)) == 0
    out = capsys.readouterr().out
    assert "step3 on 2A2F, 32 cards: 96 requests" in out
    assert "sent again" in out
    check(json.loads(trace.read_text()))


def test_a_deployment_file_says_what_the_flags_do_not(monkeypatch: Monkey, capsys: Capture, tmp_path: Path) -> None:
    file = tmp_path / "deployment.yaml"
    file.write_text(
        "model: step3\ntopology: 1A2F\nattention:\n  microbatches: 2\n  max_running: 40\n  resources: {num_gpus: 8.0}\n"
        "ffn:\n  resources: {num_gpus: 8.0}\n"
    )
    assert simulate(monkeypatch, "--deployment", str(file), "--steps", "2", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["requests"], found["cards"]) == (40, 24)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--straggler", "3"), "like attention:3x2"),
        (("--fault", "ffn:0"), "like ffn:1@0.5+0.2"),
        (("--fault", "ffn:7@0+1"), "fault ffn:7 does not exist"),
        (("--context", "1000000"), "KV cache holds"),
        (("--skew", "9"), "skew is 9"),
    ],
)
def test_what_cannot_be_is_one_sentence(
    monkeypatch: Monkey, capsys: Capture, arguments: tuple[str, ...], sentence: str
) -> None:
    assert simulate(monkeypatch, *STEP3, *arguments) == cli.USER_ERROR
    assert sentence in capsys.readouterr().err


def test_it_never_loads_torch() -> None:
    arguments = ["simulate", *STEP3, "--json"]
    code = (
        f"import sys; from afd import cli; cli.app({arguments}, standalone_mode=False); "
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
