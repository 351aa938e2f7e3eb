"""`afd cost`, `afd plan` and `afd hardware`, as a person runs them."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from afd import cli
from afd.config import load

Capture = pytest.CaptureFixture[str]
Monkey = pytest.MonkeyPatch


def afd(monkeypatch: Monkey, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["afd", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def test_the_cost_as_json_has_the_documented_keys(monkeypatch: Monkey, capsys: Capture) -> None:
    assert afd(monkeypatch, "cost", "--model", "step3", "--context", "8192", "--hardware", "H800,H20", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found) == [
        "kv_bytes",
        "attention_flops",
        "linear_flops",
        "ffn_flops",
        "usd_per_1m",
        "best",
        "minimum_sparsity",
    ]
    assert {card: sorted(halves) for card, halves in found["usd_per_1m"].items()} == {
        "H800": ["attention", "ffn"],
        "H20": ["attention", "ffn"],
    }
    assert found["best"] == {"attention_card": "H20", "ffn_card": "H800", "usd_per_1m": pytest.approx(0.055, abs=5e-4)}
    assert found["minimum_sparsity"].keys() == {"H800", "H20"}


def test_the_cost_for_people_names_the_best_pair_and_what_colocated_costs(monkeypatch: Monkey, capsys: Capture) -> None:
    assert afd(monkeypatch, "cost", "--model", "step3") == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "AFD: attention on H20, FFN on H800: 0.055; colocated: H800, 0.063." in out
    assert afd(monkeypatch, "cost", "--model", "qwen3-32b", "--dtype", "bf16") == 0
    assert "The model is dense" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["cost", "--model", "nosuch"], "unknown model 'nosuch'"),
        (["cost", "--model", "step3", "--hardware", "H9"], "unknown card 'H9'"),
        (["cost", "--model", "step3", "--context", "0"], "--context is 0"),
        (["cost", "--model", "step3", "--dtype", "int3"], "--dtype is 'int3'"),
        (["plan", "--model", "step3", "--hardware", "A:H20"], "--hardware is 'A:H20'"),
        (["plan", "--model", "step3", "--hardware", "H20", "--tpot", "fast"], "--tpot is 'fast'"),
        (["plan", "--model", "step3", "--hardware", "H20", "--batch", "0"], "--batch is 0"),
        (["hardware", "measure", "--usd-per-hour", "0"], "--usd-per-hour is 0"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_asked_is_answered_in_a_sentence(
    arguments: list[str], says: str, monkeypatch: Monkey, capsys: Capture
) -> None:
    assert afd(monkeypatch, *arguments) == 2
    assert says in capsys.readouterr().err


def test_a_plan_is_printed_written_and_drawn(monkeypatch: Monkey, capsys: Capture, tmp_path: Path) -> None:
    file, plot = tmp_path / "deployment.yaml", tmp_path / "front.svg"
    common = ["plan", "--model", "step3", "--hardware", "A:H20,F:H800", "--max-workers", "4", "--tpot", "50ms"]
    assert afd(monkeypatch, *common, "-o", str(file), "--plot", str(plot)) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "binds: " in out
    assert "AFD pays: " in out or "AFD does not pay: " in out
    assert load(file).counts.attention >= 1
    assert plot.read_text().startswith('<svg xmlns="http://www.w3.org/2000/svg"')
    assert afd(monkeypatch, *common, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["best"]["tpot_ms"] <= 50
    assert found["best"] in found["front"]


def test_the_planner_loads_neither_torch_nor_a_server_and_answers_in_under_a_second() -> None:
    heavy = "{'torch', 'ray', 'grpc', 'transformers', 'fastapi'}"
    check = (
        "import sys, afd.cli, afd.commands.cost, afd.commands.plan, afd.commands.hardware\n"
        f"sys.exit(', '.join({heavy} & set(sys.modules)) or None)"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    run = "import sys; from afd.cli import main; sys.argv = ['afd', 'cost', '--model', 'step3', '--json']; main()"
    took = []
    for _ in range(5):
        began = time.perf_counter()
        subprocess.run([sys.executable, "-c", run], capture_output=True, check=True, timeout=60)
        took.append(time.perf_counter() - began)
    assert min(took) < 1.0  # 0.4 s where nothing else runs


def test_this_machine_is_measured_and_can_be_costed(monkeypatch: Monkey, capsys: Capture, tmp_path: Path) -> None:
    file = tmp_path / "here.json"
    assert afd(monkeypatch, "hardware", "measure", "-o", str(file), "--name", "here", "--usd-per-hour", "0.1") == 0
    assert "here: reads " in capsys.readouterr().out
    machine = json.loads(file.read_text())
    assert 1e8 < machine["memory_bandwidth"] < 1e14
    assert 1e8 < machine["bf16_flops"] < 1e16
    assert afd(monkeypatch, "cost", "--model", "step3", "--hardware", f"{file},H800", "--json") == 0
    assert json.loads(capsys.readouterr().out)["usd_per_1m"].keys() == {"here", "H800"}
