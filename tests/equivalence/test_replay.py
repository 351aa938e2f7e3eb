"""A request that lost its worker goes on at another: from wherever it was cut, the rest is bit for bit the rest."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import pytest

from afd.native import library as native
from afd.types import DType, SamplingParams
from tests import tiny
from tests.rig import Result, Rig, finished, split, weights_of
from tests.rig import tiny as spec_of

EOS = 256
SPEC = spec_of("step3", vocab_size=260, eos_token_id=EOS)
PROMPT = [random.Random(5).randrange(256) for _ in range(21)]
TOKENS = 30
compiled_only = pytest.mark.skipif(native.load() is None, reason="no C++ compiler, or AFD_KERNELS=plain")


@dataclass(frozen=True)
class Asked:
    params: SamplingParams
    grammar: str = ""


def drawn(**fields: object) -> SamplingParams:
    values: dict[str, object] = {"temperature": 1.3, "max_tokens": TOKENS, "seed": 7, "ignore_eos": True}
    return SamplingParams(**(values | fields))  # type: ignore[arg-type]


FEATURES = {
    "greedy": Asked(SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)),
    "logprobs": Asked(drawn(logprobs=3)),
    "filters": Asked(drawn(top_p=0.9, top_k=40, min_p=0.01)),
    "repetition": Asked(drawn(temperature=0.4, repetition_penalty=1.7)),
    "frequency": Asked(drawn(temperature=0.4, frequency_penalty=1.5, presence_penalty=-0.8)),
    "eos": Asked(drawn(ignore_eos=False, min_tokens=11, logit_bias=((EOS, 9.0),))),
    "stop tokens": Asked(drawn(min_tokens=9, stop_token_ids=tuple(range(0, 260, 9)))),
    "bias": Asked(drawn(logit_bias=((3, 8.0), (4, 8.0), (5, -50.0)), allowed_token_ids=tuple(range(40)))),
    "bad words": Asked(drawn(allowed_token_ids=(1, 2, 3), bad_words=((1, 2), (2, 2, 3), (3,)))),
    "regex": Asked(drawn(), "start: /([a-f]{2}[0-9]){3,9}x?/"),
    "json": Asked(
        drawn(max_tokens=60, frequency_penalty=0.5),
        '{"grammars": [{"json_schema": {"type": "object", "properties": {"a": {"enum": ["yes", "no"]}, '
        '"b": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3}}, "required": ["a", "b"]}}]}',
    ),
}


@pytest.fixture(scope="module")
def tokenizer_json(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def rests(rig: Rig, asked: Asked, whole: Result) -> list[tuple[int, Result]]:
    """The request cut before each of its tokens, and what the other worker gives then; all at once."""
    ids = whole.token_ids
    found = [
        (cut, rig.submit(f"cut {cut}", PROMPT, asked.params, 1, asked.grammar, ids[:cut])) for cut in range(len(ids))
    ]
    return [(cut, finished(result)) for cut, result in found]


def ended(result: Result) -> tuple[object, object]:
    assert result.finish is not None
    return result.finish.finish_reason, result.finish.stop_token_id


@compiled_only
@pytest.mark.parametrize("feature", FEATURES)
def test_cut_anywhere_the_other_worker_gives_the_rest_bit_for_bit(feature: str, tokenizer_json: Path) -> None:
    asked = FEATURES[feature]
    kernels = {"compiled": True, "block_size": 16, "tokenizer_json": tokenizer_json}
    with split(SPEC, weights_of(SPEC), "2A1F", **kernels) as rig:  # type: ignore[arg-type]
        whole = finished(rig.submit("whole", PROMPT, asked.params, 0, asked.grammar))
        assert len(whole.tokens) >= 7, "too short to be cut"
        for cut, rest in rests(rig, asked, whole):
            assert rest.tokens == whole.tokens[cut:], f"cut after {cut} tokens"
            assert ended(rest) == ended(whole)
            assert cut == 0 or rest.cached_tokens == 0, "said once, with the first token"
        rig.check_idle()


@compiled_only
@pytest.mark.parametrize("family", ["step3", "llama", "qwen3_moe"])
def test_so_it_is_in_bf16_too(family: str) -> None:
    spec, asked = spec_of(family, vocab_size=260, eos_token_id=EOS), FEATURES["logprobs"]
    with split(spec, weights_of(spec), "2A2F", compiled=True, block_size=16, dtype=DType.BF16) as rig:
        whole = finished(rig.submit("whole", PROMPT, asked.params))
        for cut, rest in rests(rig, asked, whole):
            assert rest.tokens == whole.tokens[cut:], f"cut after {cut} tokens"


def test_the_plain_kernels_give_the_same_rest() -> None:
    asked = FEATURES["logprobs"]
    with split(SPEC, weights_of(SPEC), "2A1F") as rig:
        whole = finished(rig.submit("whole", PROMPT, asked.params))
        for cut, rest in rests(rig, asked, whole):
            assert rest.token_ids == whole.token_ids[cut:], f"cut after {cut} tokens"
            logprobs = [token.logprob for token in whole.tokens[cut:]]
            assert [token.logprob for token in rest.tokens] == pytest.approx(logprobs, abs=1e-4)


def test_a_replay_takes_what_it_can_from_the_prefix_cache_answers_included() -> None:
    asked = FEATURES["greedy"]
    with split(SPEC, weights_of(SPEC), "2A1F", block_size=4) as rig:
        whole = finished(rig.submit("whole", PROMPT, asked.params))
        computed = [engine.requests.prompt_tokens for engine in rig.engines]
        finished(rig.submit("elsewhere", PROMPT, asked.params, 1, generated=whole.token_ids[:25]))
        finished(rig.submit("here again", PROMPT, asked.params, 0, generated=whole.token_ids[:25]))
        new = [engine.requests.prompt_tokens - before for engine, before in zip(rig.engines, computed, strict=True)]
        assert new == [46 - 44, 46]


def test_generation_ends_at_the_longest_context_behind_a_replay_too() -> None:
    params = drawn(max_tokens=200)
    with split(SPEC, weights_of(SPEC), "2A1F", num_blocks=10, block_size=4) as rig:
        whole = finished(rig.submit("whole", PROMPT, params))
        assert len(whole.tokens) == 40 - len(PROMPT)
        for cut, rest in rests(rig, Asked(params), whole):
            assert (rest.token_ids, ended(rest)) == (whole.token_ids[cut:], ("length", None))
