"""Grammars at work: masks, when an answer is complete, what it overrides, and what becomes of bad ones."""

from __future__ import annotations

import queue
import threading
from pathlib import Path

import pytest
import torch

from afd.types import GenerateRequest, SampledToken, SamplingParams
from attention_worker.grammar import MAX_KEPT, Grammars, Matcher
from attention_worker.sampler import Sampler
from attention_worker.sequence import Sequence
from tests import tiny
from tests.rig import SECONDS, finished, split, weights_of
from tests.rig import tiny as spec_of

EOS, VOCAB = 256, 260


@pytest.fixture(scope="module")
def tokenizer_json(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def grammars(tokenizer_json: Path):
    grammars = Grammars(tokenizer_json, VOCAB, (EOS,))
    yield grammars
    grammars.close()


def compiled(grammars: Grammars, grammar: str) -> Matcher | str:
    outcomes: queue.Queue[Matcher | str] = queue.Queue()
    grammars.compile(grammar, outcomes.put)
    return outcomes.get(timeout=SECONDS)


def matcher(grammars: Grammars, grammar: str) -> Matcher:
    found = compiled(grammars, grammar)
    assert isinstance(found, Matcher), found
    return found


def regex(text: str) -> str:
    return f"start: /{text}/"


def ids(text: str) -> list[int]:
    """The tiny tokenizer's: bytes in the order of their characters in the byte-level alphabet."""
    from tokenizers import pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    return [alphabet.index(char) for char in text]


def allowed(of: Matcher) -> set[int]:
    return set(of.allowed().nonzero()[0].tolist())


def test_masks_follow_the_answer_and_eos_ends_it(grammars: Grammars) -> None:
    a, b = ids("ab")
    follows = matcher(grammars, regex("a[ab]*"))
    assert allowed(follows) == {a}
    assert not follows.take(a)
    assert allowed(follows) == {a, b, EOS}
    assert not follows.take(b)
    assert follows.take(EOS)


def test_an_answer_that_nothing_can_follow_is_complete_without_eos(grammars: Grammars) -> None:
    follows = matcher(grammars, regex("ab"))
    assert [follows.take(token) for token in ids("ab")] == [False, True]


def test_tokens_beyond_the_tokenizers_are_never_allowed(grammars: Grammars) -> None:
    assert allowed(matcher(grammars, regex("(?s:.)*"))) <= set(range(257))


def test_copies_go_their_own_ways(grammars: Grammars) -> None:
    a, b = ids("ab")
    one, other = matcher(grammars, regex("a+|b+")), matcher(grammars, regex("a+|b+"))
    one.take(a)
    other.take(b)
    assert (allowed(one), allowed(other), allowed(one.copy())) == ({a, EOS}, {b, EOS}, {a, EOS})


@pytest.mark.parametrize(
    ("grammar", "sentence"),
    [
        ("start: /(/", "not valid: at 1.* unclosed group"),
        ('{"grammars": [{"json_schema": {"type": "objec"}}]}', "Invalid type: objec"),
        ("start: a\na: a", "cannot go on"),
        ("x" * 200_000, "131072 are the limit"),
    ],
)
def test_a_bad_grammar_is_refused_with_a_sentence(grammars: Grammars, grammar: str, sentence: str) -> None:
    import re

    found = compiled(grammars, grammar)
    assert isinstance(found, str)
    assert re.search(sentence, found), found


def test_without_a_tokenizer_there_are_no_grammars() -> None:
    grammars = Grammars(None, VOCAB, (EOS,))
    assert "no tokenizer.json" in str(compiled(grammars, regex("a")))
    grammars.close()


def test_only_so_many_compiled_grammars_are_kept(grammars: Grammars) -> None:
    for i in range(MAX_KEPT + 5):
        matcher(grammars, regex(f"a{{{i + 1}}}"))
    assert len(grammars._kept) == MAX_KEPT


def test_a_grammar_too_costly_to_follow_ends_the_request_and_no_other(tokenizer_json: Path) -> None:
    """Reading it is cheap; its cost shows with the tokens."""
    spec = spec_of("step3", vocab_size=VOCAB, eos_token_id=EOS)
    hostile = regex("(a|b|ab|ba|aab|abb)*(a.{3000}|b.{2000}|[ab]{5,4000})c")
    long = SamplingParams(temperature=1, max_tokens=300, seed=1)
    with split(spec, weights_of(spec), tokenizer_json=tokenizer_json) as rig:
        bad = rig.submit("bad", [1, 2, 3], long, grammar=hostile)
        good = rig.submit("good", [1, 2, 3], long, grammar=regex("[ab]{200}"))
        assert len(finished(good).tokens) == 200
        assert bad.ended.wait(SECONDS)
        rig.check_idle()


def sample(grammars: Grammars, grammar: str, sampling: SamplingParams, logits: list[float] | None = None) -> list[int]:
    """All tokens of an answer, each chosen from the same logits."""
    sequence = Sequence(GenerateRequest("r", (1,), sampling, grammar=grammar), 0, 100)
    sequence.matcher = matcher(grammars, grammar)
    row = torch.tensor(logits if logits is not None else [0.0] * VOCAB)
    finish = None
    while finish is None:
        (token,) = Sampler((EOS,)).sample(row.clone().unsqueeze(0), [sequence])
        finish = sequence.append(token, (EOS,)).finish_reason
    assert finish == "stop"
    return sequence.token_ids[1:]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_grammar_wins_over_ignore_eos_and_min_tokens(grammars: Grammars, temperature: float) -> None:
    sampling = SamplingParams(
        max_tokens=50, min_tokens=20, ignore_eos=True, temperature=temperature, seed=3, repetition_penalty=1.5
    )
    assert sample(grammars, regex("ab"), sampling) == ids("ab")


def test_min_tokens_holds_eos_back_while_the_grammar_has_something_else(grammars: Grammars) -> None:
    likes_eos = [0.0] * EOS + [5.0] + [0.0] * 3
    assert sample(grammars, regex("a*"), SamplingParams(temperature=0, max_tokens=9, min_tokens=3), likes_eos) == [
        *ids("aaa"),
        EOS,
    ]
    assert sample(grammars, regex("a{0,2}"), SamplingParams(temperature=0, max_tokens=9, min_tokens=8), likes_eos) == (
        ids("aa")
    )


def test_rows_without_a_grammar_are_not_touched_and_logprobs_stay_the_models_own(grammars: Grammars) -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, VOCAB)
    greedy = SamplingParams(temperature=0, logprobs=1)
    free, bound = (Sequence(GenerateRequest(name, (1,), greedy), 0, 100) for name in "ab")
    bound.matcher = matcher(grammars, regex("[ab]"))
    expected = torch.log_softmax(logits, dim=-1)
    best = logits[0].argmax().item()
    one, other = Sampler((EOS,)).sample(logits, [free, bound])
    assert one == SampledToken(best, expected[0, best].item(), ((best, expected[0, best].item()),))
    assert other.token_id in ids("ab")
    assert other.logprob == expected[1, other.token_id].item()
    assert torch.isfinite(logits[0]).all()


def test_a_request_cancelled_while_its_grammar_is_compiled_is_forgotten(tokenizer_json: Path) -> None:
    spec = spec_of("step3", vocab_size=VOCAB, eos_token_id=EOS)
    with split(spec, weights_of(spec), tokenizer_json=tokenizer_json) as rig:
        busy = threading.Event()
        engine = rig.engines[0]
        grammars = engine._grammars
        assert grammars is not None
        grammars._thread.submit(busy.wait, SECONDS)
        cancelled = rig.submit("cancelled", [1], SamplingParams(max_tokens=5), grammar=regex("a"))
        engine.cancel(0, "cancelled")
        kept = rig.submit("kept", [1], SamplingParams(max_tokens=5), grammar=regex("ab"))
        busy.set()
        assert finished(kept).token_ids == ids("ab")
        assert not cancelled.ended.is_set()
        rig.check_idle()


def test_requests_whose_grammar_is_compiled_are_told_when_the_engine_stops(tokenizer_json: Path) -> None:
    spec = spec_of("step3", vocab_size=VOCAB, eos_token_id=EOS)
    busy = threading.Event()
    with split(spec, weights_of(spec), tokenizer_json=tokenizer_json) as rig:
        grammars = rig.engines[0]._grammars
        assert grammars is not None
        grammars._thread.submit(busy.wait, SECONDS)
        waiting = rig.submit("waiting", [1], SamplingParams(max_tokens=5), grammar=regex("a"))
    busy.set()
    assert waiting.ended.wait(SECONDS)
    assert waiting.finish is not None
    assert "stopping" in waiting.finish.error


def test_without_a_compiler_a_grammar_is_refused() -> None:
    spec = spec_of("step3")
    with split(spec, weights_of(spec)) as rig:
        refused = rig.submit("r", [1], SamplingParams(max_tokens=5), grammar=regex("a"))
        assert refused.ended.wait(SECONDS)
        assert refused.finish is not None
        assert refused.finish.client_error
        assert "follows no grammars" in refused.finish.error


def test_a_grammar_of_which_a_mask_leaves_nothing_ends_the_request_without_a_token(tokenizer_json: Path) -> None:
    """It once gave an arbitrary token, and with max_tokens 1 even called the answer complete."""
    spec = spec_of("step3", vocab_size=VOCAB, eos_token_id=EOS)
    with split(spec, weights_of(spec), tokenizer_json=tokenizer_json) as rig:
        for temperature in (0.0, 1.0):
            params = SamplingParams(max_tokens=1, temperature=temperature, allowed_token_ids=(ord("b"),))
            refused = rig.submit(f"at {temperature}", [1], params, grammar=regex("a+"))
            assert refused.ended.wait(SECONDS)
            assert refused.finish is not None
            assert refused.finish.client_error
            assert refused.tokens == []
            assert "allowed_token_ids" in refused.finish.error


def test_a_grammar_that_nobody_waits_for_any_more_is_not_compiled(grammars: Grammars) -> None:
    outcomes: queue.Queue[Matcher | str] = queue.Queue()
    grammars.compile(regex("a"), outcomes.put, wanted=lambda: False)
    assert isinstance(compiled(grammars, regex("b")), Matcher)
    assert outcomes.empty()
    assert list(grammars._kept) == [regex("b")]
