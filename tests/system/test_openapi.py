"""What the OpenAPI document allows, and what it does not: never a 500, never a hang, always an answer it describes.

schemathesis reads the document of a running server and makes the requests. Answers are kept short, so that it is quick.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests import tiny
from tests.system.serving import Serving, serving

schemathesis = pytest.importorskip("schemathesis")
conformance = pytest.importorskip("schemathesis.specs.openapi.checks")

CHECKS = [conformance.response_schema_conformance, conformance.status_code_conformance]
EXAMPLES = {"POST": 60, "GET": 10}  # of each operation; those without a body have little to vary
SECONDS = 10.0  # longest wait for an answer
OPERATIONS = (
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
    ("GET", "/v1/models/{model_id}"),
    ("GET", "/debug/timeline"),
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    model = tiny.write(tmp_path_factory.mktemp("models") / "tiny")
    with serving(model, "--transport", "inproc") as running:
        yield running


@pytest.fixture(scope="module")
def document(server: Serving) -> dict[str, Any]:
    return dict(httpx.get(f"{server.url}/openapi.json", timeout=SECONDS).json())


def shortened(body: Any) -> Any:
    """The same request with a short answer of few choices, and time for it, for without that 504 is the right answer;
    what is not even an object goes as it is."""
    if not isinstance(body, dict):
        return body
    limits = {"max_tokens": 3, "max_completion_tokens": 3, "n": 2, "best_of": 2, "min_tokens": 3}
    few = {k: min(v, limits[k]) if k in limits and type(v) is int else v for k, v in body.items()}
    if type(few.get("timeout")) in (int, float) and 0 < few["timeout"] < SECONDS:
        few["timeout"] = SECONDS
    if "prompt" in few or "messages" in few:
        few.setdefault("max_tokens", 3)
    return few


@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_no_request_that_the_document_suggests_ends_in_a_500_or_a_hang(
    server: Serving, document: dict[str, Any], method: str, path: str
) -> None:
    schema = schemathesis.openapi.from_dict(document)
    operation = schema[path][method]
    good, bad = (operation.as_strategy(generation_mode=mode) for mode in schemathesis.GenerationMode)
    seen: set[int] = set()

    @settings(
        max_examples=EXAMPLES[method],
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=st.one_of(good, bad))
    def ask(case: Any) -> None:
        case.body = shortened(case.body)
        response = case.call(base_url=server.url, timeout=SECONDS)
        seen.add(response.status_code)
        assert response.status_code < 500, f"{case.as_curl_command()}\n{response.text}"
        if response.status_code != 405:
            case.validate_response(response, checks=CHECKS)

    ask()
    assert 200 in seen or path == "/v1/models/{model_id}", f"no request was served: {seen}"
    assert httpx.get(f"{server.url}/ready", timeout=SECONDS).status_code == 200


def test_every_operation_without_a_body_answers_as_described(server: Serving, document: dict[str, Any]) -> None:
    for path, operations in document["paths"].items():
        if "get" in operations and "{" not in path:
            response = httpx.get(f"{server.url}{path}", timeout=SECONDS)
            assert response.status_code == 200, path
            assert response.headers["x-request-id"]
