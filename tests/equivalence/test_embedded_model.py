"""The embedded model, as shipped and re-expressed as Step-3, against transformers reading the same GGUF."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, LlamaForCausalLM
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from afd import build
from afd import spec as specs
from afd.config import Deployment
from afd.models import registry
from afd.models.reference import WholeModel
from afd.topology import FfnShard
from afd.types import Role
from afd.weights import dummy, library
from afd.weights.convert import LlamaToStep3, Recipe
from afd.weights.prepare import GGUF_NAME

NUM_TOKENS = 64
EOS = 2  # <|im_end|>
CLEAR = 0.01  # logits: where transformers' best two are further apart, the best must be the same
QUESTION = "What is the capital of France?"
PROMPTS = (  # each is cut to PROMPT_TOKENS, so that transformers can batch them without padding
    "Once upon a time, in a small village by the northern sea, there lived an old fisherman who",
    "def quicksort(items):\n    if len(items) <= 1:\n        return items\n    pivot = items[0]",
    "The first ten prime numbers are 2, 3, 5, 7, 11, 13, 17, 19, 23 and",
    "Translate this sentence to French: 'Good morning, how are you today?' →",
    '{"name": "Ada Lovelace", "born": 1815, "died": 1852, "field": "mathematics",',
    "Question: Why is the sky blue during the day and red at sunset?\nAnswer: Because",
    "Ingredients:  2 eggs, 100 g flour, 1½ cups of milk 🥛\n\nSteps:\n1. Beat the",
    "In 1687 Isaac Newton published the Principia, in which he set out the laws of motion",
)
PROMPT_TOKENS = 16
ESSAY = "In 1687 Isaac Newton published the Principia, in which he set out the laws of motion and of gravity. " * 20


@dataclass(frozen=True)
class Run:
    """One greedy continuation by transformers: its prompt, its tokens, and the logits each was chosen from."""

    prompt: list[int]
    tokens: list[int]
    logits: Tensor  # [tokens, vocab]


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def model_of_transformers(folder: Path) -> LlamaForCausalLM:
    """What from_pretrained(folder, gguf_file=GGUF_NAME, dtype=float32) gives, without the package accelerate, which
    that asks for and does not need. The config.json beside the GGUF must say what transformers reads in the GGUF."""
    config = AutoConfig.from_pretrained(folder)
    model = LlamaForCausalLM(config).eval()
    loaded = load_gguf_checkpoint(
        str(folder / GGUF_NAME), return_tensors=True, model_to_load=model, torch_dtype=torch.float32
    )
    ours = {**config.to_dict(), **config.rope_parameters}
    theirs = {key: value for key, value in loaded["config"].items() if key in ours and not key.startswith("_")}
    assert theirs == {key: ours[key] for key in theirs}
    assert {"hidden_size", "head_dim", "rms_norm_eps", "rope_theta", "max_position_embeddings"} < theirs.keys()
    result = model.load_state_dict(loaded["tensors"], strict=False)
    assert (result.missing_keys, result.unexpected_keys) == (["lm_head.weight"], [])
    return model


@dataclass(frozen=True)
class Oracle:
    """transformers' answer to QUESTION through the chat template, its continuations of PROMPTS, and its logits after
    every token of ESSAY."""

    answer: Run
    runs: list[Run]
    essay: list[int]
    essay_logits: Tensor  # [tokens, vocab]


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    torch.set_num_threads(2)
    folder = library.prepare("smollm2")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = model_of_transformers(folder)

    def continue_(prompts: list[list[int]], eos: int | None) -> list[Run]:
        ids = torch.tensor(prompts)
        model.generation_config.eos_token_id = eos
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=NUM_TOKENS,
            pad_token_id=EOS,
            return_dict_in_generate=True,
            output_logits=True,
        )
        tokens, logits = out.sequences[:, ids.shape[1] :].tolist(), torch.stack(out.logits, dim=1)
        return [Run(prompts[i], tokens[i], logits[i]) for i in range(len(prompts))]

    messages = [{"role": "user", "content": QUESTION}]
    chat = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    prompts = [tokenizer.encode(text)[:PROMPT_TOKENS] for text in PROMPTS]
    essay = tokenizer.encode(ESSAY)
    with torch.inference_mode():
        essay_logits = model(torch.tensor([essay])).logits[0]
    return Oracle(continue_([chat], EOS)[0], continue_(prompts, None), essay, essay_logits)


def whole_model(name: str) -> WholeModel:
    library.prepare(name)
    plan = build.plan(Deployment(model=name, dtype="fp32", device="cpu"))
    one = FfnShard(0, 1, 1)
    attention = plan.family.attention(plan.spec, plan.weights(Role.ATTENTION))
    return WholeModel(plan.spec, attention, plan.family.ffn(plan.spec, plan.weights(Role.FFN, one), one))


@pytest.fixture(scope="module")
def step3() -> WholeModel:
    return whole_model("smollm2-step3")


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.smollm2
def test_smollm2_generates_exactly_the_tokens_of_transformers(oracle: Oracle) -> None:
    model = whole_model("smollm2")
    text = Tokenizer.from_file(str(library.folder("smollm2") / "tokenizer.json")).decode(oracle.answer.tokens)
    assert "Paris" in text
    assert oracle.answer.tokens[-1] == EOS
    assert model.generate(oracle.answer.prompt, NUM_TOKENS, eos_ids={EOS}) == oracle.answer.tokens
    for run in oracle.runs:
        assert (len(run.prompt), len(run.tokens)) == (PROMPT_TOKENS, NUM_TOKENS)
        assert model.generate(run.prompt, NUM_TOKENS) == run.tokens
    assert relative(model.forward(oracle.essay), oracle.essay_logits) < 1e-5


@pytest.mark.smollm2
def test_smollm2_as_step3_answers_the_question_with_the_tokens_of_transformers(
    oracle: Oracle, step3: WholeModel
) -> None:
    assert step3.generate(oracle.answer.prompt, NUM_TOKENS, eos_ids={EOS}) == oracle.answer.tokens


@pytest.mark.smollm2
def test_smollm2_as_step3_chooses_the_same_token_wherever_the_choice_is_clear(
    oracle: Oracle, step3: WholeModel
) -> None:
    """Each position is asked with transformers' tokens before it, so one close call does not hide what comes after."""
    clear = same = total = 0
    for run in [oracle.answer, *oracle.runs]:
        logits = step3.forward(run.prompt + run.tokens[:-1])[len(run.prompt) - 1 :]
        assert relative(logits, run.logits) < 1e-4
        best = run.logits.topk(2).values
        is_clear, agrees = best[:, 0] - best[:, 1] > CLEAR, logits.argmax(-1) == torch.tensor(run.tokens)
        assert agrees[is_clear].all()
        clear, same, total = clear + int(is_clear.sum()), same + int(agrees.sum()), total + len(run.tokens)
    print(f"{same} of {total} tokens are transformers'; {clear} of the choices were clear, and all of those agree")
    assert clear > 0.98 * total
    assert relative(step3.forward(oracle.essay), oracle.essay_logits) < 1e-4


def test_a_random_llama_and_its_step3_form_give_the_same_logits() -> None:
    """GQA of 3 groups, theta and sizes unlike the embedded model's, some layers dense and some MoE."""
    config: dict[str, object] = {
        "model_type": "llama",
        "hidden_size": 48,
        "num_hidden_layers": 4,
        "intermediate_size": 60,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "head_dim": 8,
        "vocab_size": 101,
        "max_position_embeddings": 256,
        "rope_theta": 5000.0,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
    }
    spec = specs.from_config(config)
    weights = dummy.weights(registry.family("llama").tensors(spec), seed=5)
    conversion = LlamaToStep3.from_config(config, Recipe(experts=5, top_k=3, dense_first=1, dense_last=1, seed=9))

    def read(name: str) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
        return weights[name].numpy()

    converted = {k: torch.from_numpy(v) for k, v in conversion.top(read).items()}
    for layer in range(spec.layers):
        converted |= {k: torch.from_numpy(v) for k, v in conversion.layer(layer, read).items()}
    tokens = torch.randint(0, 101, (40,), generator=torch.Generator().manual_seed(0)).tolist()
    expected = _whole(config, weights).forward(tokens)
    found = _whole(conversion.config(), converted).forward(tokens)
    assert sum(values.nbytes for values in converted.values()) == conversion.total_bytes()
    assert (found - expected).norm() / expected.norm() < 1e-4
    assert not torch.equal(found, expected)


def _whole(config: Mapping[str, object], weights: Mapping[str, Tensor]) -> WholeModel:
    spec = specs.from_config(config)
    family = registry.family(spec.family)
    assert {t.name: t.shape for t in family.tensors(spec)} == {name: tuple(w.shape) for name, w in weights.items()}
    return WholeModel(spec, family.attention(spec, weights), family.ffn(spec, weights, FfnShard(0, 1, 1)))
