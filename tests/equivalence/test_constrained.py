"""With a grammar, the split model gives the whole model's tokens chosen under the same constraint, step by step.

The constraint is computed twice, by two means: the oracle knows every text of a finite language and tries every token.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from afd.types import SamplingParams
from tests import tiny
from tests.rig import finished, split, weights_of, whole
from tests.rig import tiny as spec_of

EOS = 256
SPEC = spec_of("step3", vocab_size=260, eos_token_id=EOS)
GREEDY = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
LANGUAGES: dict[str, set[str]] = {
    'start: "yes" | "yesterday" | "no"': {"yes", "yesterday", "no"},
    "start: /[abc]{2,5}x?/": {
        "".join(letters) + end
        for n in range(2, 6)
        for letters in itertools.product("abc", repeat=n)
        for end in ("", "x")
    },
    '{"grammars": [{"json_schema": {"enum": ["a", 10, null, 1.5, true]}}]}': {'"a"', "10", "null", "1.5", "true"},
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer_json(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def oracle(prompt: list[int], language: Iterable[str], tokenizer: Tokenizer) -> list[int]:
    """The whole model's best token of those that can still lead to a text of `language`; EOS where one is whole."""
    model, texts = whole(SPEC, weights_of(SPEC)), [tuple(tokenizer.encode(text).ids) for text in language]
    generated: list[int] = []
    while True:
        n = len(generated)
        going = [ids for ids in texts if ids[:n] == tuple(generated)]
        allowed = {ids[n] if n < len(ids) else EOS for ids in going}
        if allowed == {EOS}:
            return generated
        logits = model.forward([*prompt, *generated])[-1]
        bias = torch.full_like(logits, -torch.inf)
        bias[sorted(allowed)] = 0
        generated.append(int((logits + bias).argmax()))
        if generated[-1] == EOS:
            return generated


def prompts(count: int) -> list[list[int]]:
    rng = random.Random(1)
    return [[rng.randrange(256) for _ in range(rng.choice([1, 7, 40]))] for _ in range(count)]


@pytest.mark.parametrize("grammar", LANGUAGES)
def test_constrained_tokens_are_the_whole_models_under_the_same_constraint(grammar: str, tokenizer_json: Path) -> None:
    tokenizer, asked = Tokenizer.from_file(str(tokenizer_json)), prompts(5)
    expected = [oracle(prompt, LANGUAGES[grammar], tokenizer) for prompt in asked]
    with split(SPEC, weights_of(SPEC), "1A2F", tokenizer_json=tokenizer_json) as rig:
        free = rig.submit("free", asked[0], GREEDY)
        results = [rig.submit(str(i), prompt, GREEDY, grammar=grammar) for i, prompt in enumerate(asked)]
        assert [finished(result).token_ids for result in results] == expected
        assert {finished(result).finish.finish_reason for result in results if result.finish} == {"stop"}
        assert finished(free).token_ids == whole(SPEC, weights_of(SPEC)).generate(asked[0], GREEDY.max_tokens)
        rig.check_idle()


def test_a_preempted_answer_goes_on_in_its_grammar(tokenizer_json: Path) -> None:
    """With room for a few only, requests are preempted again and again; their tokens are those they get alone."""
    grammar = "start: /([a-f]{3}[0-9]){15}/"
    answers, preempted = [], []
    for num_blocks in (256, 40):
        with split(SPEC, weights_of(SPEC), num_blocks=num_blocks, tokenizer_json=tokenizer_json) as rig:
            results = [
                rig.submit(str(i), prompt, SamplingParams(temperature=1, max_tokens=100, seed=i), grammar=grammar)
                for i, prompt in enumerate(prompts(8))
            ]
            answers.append([finished(result).token_ids for result in results])
            preempted.append(rig.engines[0].scheduler.preemptions)
    assert answers[0] == answers[1]
    assert all(len(answer) == 60 for answer in answers[0])
    assert preempted[0] == 0
    assert preempted[1] > 0
