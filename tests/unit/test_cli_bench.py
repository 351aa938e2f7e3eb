"""`afd bench` as a user runs it, against servers by script: tables, files, exit codes, and what is refused."""

from __future__ import annotations

import itertools
import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.system.serving import AFD, until
from tests.unit.loadtest.scripted_server import Script, serving
from tests.unit.test_cli import Capture, Monkey, afd

MODELS = json.dumps({"object": "list", "data": [{"id": "toy"}, {"id": "other"}]})
STATUS = json.dumps({"workers": [{"role": "attention", "rank": 0}, {"role": "ffn", "rank": 0}]})


def script(**fields: object) -> Script:
    return Script(get={"/v1/models": lambda: MODELS}, first_s=0.002, step_s=0.001, **fields)  # type: ignore[arg-type]


def told(capsys: Capture) -> dict[str, object]:
    """The last line, as --json makes it."""
    return dict(json.loads(capsys.readouterr().out.splitlines()[-1]))


def test_a_load_test_prints_tables_and_writes_its_files(tmp_path: Path, monkeypatch: Monkey, capsys: Capture) -> None:
    with serving(script()) as url:
        arguments = ["--url", f"{url}/v1/", "--requests", "12", "--concurrency", "3", "--output-tokens", "4"]
        assert afd(monkeypatch, "bench", *arguments, "--slo", "ttft=5s", "--output", str(tmp_path / "new/folder")) == 0
    out = capsys.readouterr().out
    for words in ("toy", "12 sent, 12 answered", "TTFT", "TPOT", "ITL", "E2E", "100.0 % meet ttft"):
        assert words in out
    summary = json.loads((tmp_path / "new/folder/summary.json").read_text())
    assert summary["answered"] == 12
    assert summary["goodput"]["share"] == 1.0
    lines = [json.loads(line) for line in (tmp_path / "new/folder/requests.jsonl").read_text().splitlines()]
    assert [line["output_tokens"] for line in lines] == [4] * 12
    page = (tmp_path / "new/folder/report.html").read_text()
    assert page.count("<svg") >= 7
    assert not re.search(r"""(src|href|url|@import)\s*[=(]""", page), "the report fetches something"


@pytest.mark.parametrize(
    ("arguments", "load"),
    [
        (["--rate", "100", "--requests", "10"], "100 requests/s, poisson arrivals"),
        (["--rate", "100", "--duration", "0.2", "--arrivals", "constant"], "100 requests/s, constant arrivals"),
        (["--rate", "100", "--burstiness", "0.5", "--requests", "10"], "100 requests/s, gamma arrivals"),
        (["--ramp", "10:100:0.3"], "ramp 10:100:0.3, poisson arrivals"),
        (["--duration", "0.2"], "8 at a time"),
        (["--endpoint", "chat", "--data", "prefix", "--prefix-tokens", "20", "--requests", "5"], "8 at a time"),
    ],
)
def test_every_way_to_arrive_is_one(arguments: list[str], load: str, monkeypatch: Monkey, capsys: Capture) -> None:
    with serving(script()) as url:
        assert afd(monkeypatch, "bench", "--url", url, "--output-tokens", "3", "--json", *arguments) == 0
    found = told(capsys)
    assert found["setup"]["load"] == load  # type: ignore[index]
    assert found["answered"] == found["sent"] > 0  # type: ignore[operator]


def test_a_trace_is_sent_at_its_times(tmp_path: Path, monkeypatch: Monkey) -> None:
    file = tmp_path / "trace.jsonl"
    arrivals = [(50.0, 6, 3), (50.3, 4, 2), (50.1, 5, 1)]
    lines = [json.dumps({"timestamp": t, "input_length": i, "output_length": o}) for t, i, o in arrivals]
    file.write_text("\n".join(lines))
    with serving(answering := script()) as url:
        assert afd(monkeypatch, "bench", "--url", url, "--data", f"trace:{file}", "-o", str(tmp_path)) == 0
    sent = [json.loads(line) for line in (tmp_path / "requests.jsonl").read_text().splitlines()]
    assert [line["asked_tokens"] for line in sent] == [3, 1, 2]
    assert [line["due_s"] for line in sent] == pytest.approx([0.0, 0.1, 0.3])
    assert [line["sent_s"] for line in sent] == pytest.approx([0.0, 0.1, 0.3], abs=0.08)
    assert [len(body["prompt"]) for body in answering.bodies] == [6, 5, 4]  # type: ignore[arg-type]


def test_ctrl_c_ends_a_run_with_the_figures_so_far() -> None:
    with serving(answering := script()) as url:
        command = [AFD, "bench", "--url", url, "--duration", "60", "--concurrency", "1"]
        command += ["--output-tokens", "3", "--json"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        until(lambda: len(answering.bodies) >= 3, 30.0)  # one at a time: two have been answered to the end
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
    assert process.returncode == 0, err
    assert json.loads(out.splitlines()[-1])["sent"] > 0


def test_a_sweep_tells_every_rate_it_tried(monkeypatch: Monkey, capsys: Capture) -> None:
    """The server answers its first forty requests, which are two probes."""
    with serving(script(status=lambda number: 200 if number < 40 else 429)) as url:
        arguments = ["--sweep", "--slo", "ttft=10s", "--rate", "400", "--requests", "20", "--output-tokens", "2"]
        assert afd(monkeypatch, "bench", "--url", url, *arguments, "--json") == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out.splitlines()[-1])
    tried = [(probe["rate"], probe["met"]) for probe in found["sweep"]["probes"]]
    assert tried[:3] == [(400.0, True), (800.0, True), (1600.0, False)]
    assert found["sweep"]["rate"] == 800.0
    assert captured.err.count("within objectives") == len(tried)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--model", "nosuch"], "model 'nosuch' is not served at {url}; it has toy, other (--model)"),
        (["--endpoint", "responses"], "--endpoint is 'responses'"),
        (["--rate", "5", "--concurrency", "2"], "--concurrency and --rate do not go together"),
        (["--sweep"], "say them with --slo"),
        (["--rate", "-1"], "--rate is -1"),
        (["--rate", "5", "--arrivals", "uniform"], "--arrivals is 'uniform'"),
        (["--arrivals", "poisson"], "for loads with a rate"),
        (["--rate", "5", "--arrivals", "poisson", "--burstiness", "2"], "which is for --arrivals gamma"),
        (["--requests", "0"], "--requests is 0"),
        (["--data", "wikipedia"], "--data is 'wikipedia'"),
        (["--data", "trace:/no/such.jsonl"], "cannot read /no/such.jsonl"),
        (["--output-tokens", "x"], "--output-tokens is 'x'"),
        (["--slo", "speed=1s"], "--slo holds 'speed=1s'"),
        (["--warmup", "soon"], "--warmup is 'soon'"),
        (["--prices", "attention=1,ffn=2"], "does not say which workers it has"),
        (["--model-path", "/no/such/model", "--prices", "total=1"], "unknown model '/no/such/model'"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_sent(
    arguments: list[str], sentence: str, monkeypatch: Monkey, capsys: Capture
) -> None:
    with serving(answering := script()) as url:
        assert afd(monkeypatch, "bench", "--url", url, *arguments) == 2
        assert sentence.format(url=url) in " ".join(capsys.readouterr().err.split())
    assert answering.bodies == []


@pytest.mark.parametrize(("named", "sent"), [({}, set()), ({"OPENAI_API_KEY": "theirs"}, {"theirs"})])
def test_a_foreign_server_never_sees_our_own_servers_key(
    named: dict[str, str], sent: set[str], monkeypatch: Monkey
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    for name, value in (named | {"AFD_API_KEYS": "ours"}).items():
        monkeypatch.setenv(name, value)
    with serving(answering := script()) as url:
        assert afd(monkeypatch, "bench", "--url", url, "--requests", "2", "--output-tokens", "2") == 0
    assert len(answering.bodies) == 2
    assert answering.keys == sent


@pytest.mark.parametrize(
    ("url", "sentence"),
    [("http://127.0.0.1:1", "nothing answers at http://127.0.0.1:1"), ("not a url", "not a url")],
)
def test_a_wrong_url_is_one_sentence(url: str, sentence: str, monkeypatch: Monkey, capsys: Capture) -> None:
    assert afd(monkeypatch, "bench", "--url", url) == 2
    assert sentence in capsys.readouterr().err


def test_a_server_of_something_else_is_one_sentence(monkeypatch: Monkey, capsys: Capture) -> None:
    with serving(Script(get={"/v1/models": lambda: "<html>"})) as url:
        assert afd(monkeypatch, "bench", "--url", url) == 2
    assert "not as OpenAI's API does" in capsys.readouterr().err


def test_refusals_are_shown_and_nothing_but_refusals_is_an_error(
    tmp_path: Path, monkeypatch: Monkey, capsys: Capture
) -> None:
    with serving(script(status=lambda number: 429 if number % 2 else 200)) as url:
        assert afd(monkeypatch, "bench", "--url", url, "--requests", "10", "--output-tokens", "2", "--json") == 0
    found = told(capsys)
    assert found["errors"] == {"429": {"count": 5, "example": "refused with 429"}}
    with serving(script(status=lambda _: 503)) as url:
        arguments = ["--requests", "4", "--output", str(tmp_path)]
        assert afd(monkeypatch, "bench", "--url", url, *arguments) == 2
    assert "no request was answered: 503 (4 times): refused with 503" in capsys.readouterr().err
    assert (tmp_path / "report.html").is_file()


def test_what_a_server_says_is_text_in_the_report(tmp_path: Path, monkeypatch: Monkey) -> None:
    models = json.dumps({"data": [{"id": "<script>alert(1)</script>"}]})
    with serving(Script(get={"/v1/models": lambda: models}, first_s=0, step_s=0)) as url:
        assert afd(monkeypatch, "bench", "--url", url, "--requests", "3", "-o", str(tmp_path)) == 0
    page = (tmp_path / "report.html").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;" in page


def test_another_servers_cost_is_its_total_and_says_why(monkeypatch: Monkey, capsys: Capture) -> None:
    with serving(script()) as url:
        assert afd(monkeypatch, "bench", "--url", url, "--requests", "10", "--prices", "total=3.6", "--json") == 0
    found = told(capsys)
    assert found["cost"]["total"] == pytest.approx(1000 / found["output_tokens_per_s"])  # type: ignore[index,operator]
    assert found["cost"]["attention"] is None  # type: ignore[index]
    assert "does not say which workers" in found["cost"]["note"]  # type: ignore[index]


def test_a_server_of_ours_splits_the_cost_by_its_counters(monkeypatch: Monkey, capsys: Capture) -> None:
    """Every reading of its counters is a second later: attention is always busy, FFN a quarter of its time."""
    shares = [("attention", "attention", 1.0), ("ffn", "ffn", 0.25), ("ffn", "idle", 0.75)]
    seconds = itertools.count()

    def metrics() -> str:
        now = next(seconds)
        labels = [(f'role="{role}",rank="0",activity="{name}"', share * now) for role, name, share in shares]
        return "\n".join(f"afd_activity_seconds_total{{{named}}} {value}" for named, value in labels)

    answering = script()
    answering.get |= {"/status": lambda: STATUS, "/metrics": metrics}
    with serving(answering) as url:
        arguments = ["--duration", "2.2", "--output-tokens", "20", "--prices", "attention=1,ffn=3", "--json"]
        assert afd(monkeypatch, "bench", "--url", url, *arguments) == 0
    found = told(capsys)
    split, total = found["cost"], found["cost"]["total"]  # type: ignore[index]
    assert [split[k] / total for k in ("attention", "ffn", "idle")] == pytest.approx([0.25, 0.1875, 0.5625])  # type: ignore[index]


def test_the_load_test_needs_no_torch() -> None:
    check = "import afd.commands.bench, sys; sys.exit(', '.join({'torch', 'ray', 'grpc'} & set(sys.modules)) or None)"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
