"""The embedded chat model as a newcomer meets it: `afd serve`, its own Ray, an OpenAI client."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
import torch
from tokenizers import Tokenizer

from afd import build
from afd.config import Deployment
from afd.models.reference import WholeModel
from afd.topology import FfnShard
from afd.types import Role
from tests.system.serving import Serving, serving

pytestmark = pytest.mark.smollm2

QUESTION = "What is the capital of France?"
PROMPTS = (
    "Once upon a time, in a small village by the sea,",
    "def quicksort(items):\n    if len(items) <= 1:",
    "The first ten prime numbers are 2, 3, 5, 7,",
)
TOKENS = 12


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def oracle(model: str) -> list[list[int]]:
    """The whole model's greedy continuations; test_embedded_model in tests/equivalence ties it to transformers."""
    plan = build.plan(Deployment(model=model, dtype="fp32"))
    one = FfnShard(0, 1, 1)
    whole = WholeModel(
        plan.spec,
        plan.family.attention(plan.spec, plan.weights(Role.ATTENTION)),
        plan.family.ffn(plan.spec, plan.weights(Role.FFN, one), one),
    )
    assert plan.files.tokenizer_json is not None
    tokenizer = Tokenizer.from_file(str(plan.files.tokenizer_json))
    return [whole.generate(tokenizer.encode(p, add_special_tokens=False).ids, TOKENS) for p in PROMPTS]


def ask(server: Serving, model: str) -> tuple[str, float]:
    """The greedy answer to QUESTION, and how many seconds after the question it began."""
    asked, first_s, answer = time.monotonic(), 0.0, ""
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        messages = [{"role": "user", "content": QUESTION}]
        chunks = client.chat.completions.create(model=model, messages=messages, temperature=0, stream=True)  # type: ignore[call-overload]
        for chunk in chunks:
            if chunk.choices and chunk.choices[0].delta.content:
                first_s = first_s or time.monotonic() - asked
                answer += chunk.choices[0].delta.content
    return answer, first_s


@pytest.mark.ray
def test_a_prepared_model_answers_within_20_seconds_of_the_command() -> None:
    took = []
    while not took or (min(took) >= 20.0 and len(took) < 3):  # other people's load on the machine is not ours
        # In bf16 the answer's first token hangs on two logits that are closer than its rounding.
        with serving("smollm2-step3", "--dtype", "fp32") as server:
            answer, first_s = ask(server, "smollm2-step3")
            assert answer == "The capital of France is Paris."
            took.append(server.start_s + first_s)
            code, stop_s = server.stop()
            assert code == 0
            assert stop_s < 10.0
    assert min(took) < 20.0, f"seconds from the command to the first token: {took}"


@pytest.mark.parametrize(
    ("model", "arguments"),
    [("smollm2-step3", ("--topology", "2A1F")), ("smollm2", ("--topology", "1A2F", "--ffn-sharding", "tp"))],
)
def test_a_client_gets_the_whole_models_answer(model: str, arguments: tuple[str, ...]) -> None:
    with (
        serving(model, "--dtype", "fp32", "--backend", "local", *arguments) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as client,
    ):
        assert ask(server, model)[0] == "The capital of France is Paris."

        def complete(prompt: str) -> list[int]:
            body = {"ignore_eos": True, "return_token_ids": True}
            done = client.completions.create(
                model=model, prompt=prompt, max_tokens=TOKENS, temperature=0, extra_body=body
            )
            return list(done.choices[0].token_ids)  # type: ignore[attr-defined]

        with ThreadPoolExecutor(len(PROMPTS)) as pool:
            answers = list(pool.map(complete, PROMPTS))
    assert answers == oracle(model)
