"""A server with keys, prices and JSON logs from a deployment file, and what requests say of single tokens."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests import tiny
from tests.system.serving import Serving, serving, until

DEPLOYMENT = """
router:
  api_keys_file: {keys}
  log_format: json
  prices: {{attention: 3.6, ffn: 1.8}}
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    folder = tmp_path_factory.mktemp("deployment")
    (folder / "keys").write_text("the-key\n")
    (folder / "deployment.yaml").write_text(DEPLOYMENT.format(keys=folder / "keys"))
    model = tiny.write(folder / "tiny")
    with serving(model, str(folder / "deployment.yaml"), "--transport", "inproc", "--dtype", "fp32") as running:
        yield running


@pytest.fixture
def http(server: Serving) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, headers={"Authorization": "Bearer the-key"}, timeout=60) as client:
        yield client


def complete(http: httpx.Client, **fields: Any) -> dict[str, Any]:
    body = {"model": "tiny", "prompt": "some secret words", "max_tokens": 12, "return_token_ids": True, **fields}
    response = http.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    return dict(response.json())


def token_ids(answer: dict[str, Any]) -> list[int]:
    return list(answer["choices"][0]["token_ids"])


def test_a_server_with_keys_serves_who_has_one_and_logs_it_as_json(server: Serving, http: httpx.Client) -> None:
    assert httpx.get(f"{server.url}/v1/models").status_code == 401
    http.headers["X-Request-Id"] = "mine"
    complete(http)

    def entries() -> list[dict[str, Any]]:
        return [json.loads(line) for line in list(server.lines) if '"request_id": "mine"' in line]

    until(entries)
    [entry] = entries()
    assert (entry["status"], entry["generated_tokens"], entry["who"]) == (200, 12, "router")
    assert 0 <= entry["queue_s"] <= entry["ttft_s"] <= entry["total_s"]
    assert not any(word in "".join(server.lines) for word in ("secret", "the-key"))


def test_metrics_say_how_long_requests_waited_and_what_tokens_cost(server: Serving, http: httpx.Client) -> None:
    complete(http)

    def costs() -> bool:
        return 'afd_cost_usd_per_million_tokens{part="attention"}' in httpx.get(f"{server.url}/metrics").text

    until(costs)  # the controller asks the workers a few times a second
    lines = httpx.get(f"{server.url}/metrics").text.splitlines()
    values = {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}
    assert values["afd_request_queue_time_seconds_count"] >= 1
    assert values["afd_request_time_per_output_token_seconds_count"] >= 1
    assert 0 < values['afd_busy_share{rank="0",role="attention"}'] <= 1
    assert values['afd_kv_cache_usage_perc{attention_rank="0"}'] <= 1
    assert values['afd_cost_usd_total{role="attention"}'] > 0


def test_masks_and_biases_hold_for_every_token_of_an_answer(http: httpx.Client) -> None:
    plain = token_ids(complete(http, temperature=0, ignore_eos=True))
    assert set(token_ids(complete(http, allowed_token_ids=[65, 66, 67], seed=1))) <= {65, 66, 67}
    assert set(token_ids(complete(http, logit_bias={"70": 100}))) == {70}
    banned = {str(token): -100 for token in set(plain)}
    assert not set(token_ids(complete(http, temperature=0, ignore_eos=True, logit_bias=banned))) & set(plain)
    for seed in range(5):
        fields: dict[str, Any] = {"allowed_token_ids": [32, 33], "seed": seed, "max_tokens": 40}
        letters = complete(http, **fields)["choices"][0]["text"]
        worse = complete(http, **fields, bad_words=[letters[:2]])["choices"][0]["text"]
        assert letters[:2] not in worse


def test_best_of_gives_the_likeliest_of_the_answers_that_n_would_give(http: httpx.Client) -> None:
    fields: dict[str, Any] = {"seed": 7, "ignore_eos": True}
    all_five = complete(http, **fields, n=5, logprobs=0)["choices"]
    likeliest = max(all_five, key=lambda choice: sum(choice["logprobs"]["token_logprobs"]))
    best = complete(http, **fields, best_of=5)
    assert best["choices"][0]["token_ids"] == likeliest["token_ids"]
    assert best["usage"]["completion_tokens"] == 60
