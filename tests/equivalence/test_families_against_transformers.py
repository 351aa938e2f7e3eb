"""Each family gives transformers' logits (step3: those of a plain reference written here)."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from afd.models import registry
from afd.spec import from_config
from tests.equivalence.checkpoints import (
    LLAMA,
    MODELS,
    QWEN3_MOE,
    STEP3,
    by_transformers,
    random_weights,
    whole_model,
)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def prompt(length: int = 80, seed: int = 0) -> list[int]:
    return torch.randint(0, 131, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def assert_close(found: Tensor, expected: Tensor) -> None:
    """Within 1e-4 of the largest, in float32."""
    assert found.dtype == torch.float32
    assert found.shape == expected.shape
    error = ((found - expected).abs().max() / expected.abs().max()).item()
    assert error < 1e-4, f"relative error {error}"


ROPES: dict[str, dict[str, object]] = {
    "default": {},
    "linear": {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "llama3": {
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
    "yarn": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}},
    "yarn with every setting": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 5000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
            "beta_fast": 8.0,
            "beta_slow": 0.5,
            "mscale": 0.7,
            "mscale_all_dim": 1.3,
            "truncate": False,
        }
    },
    "yarn with attention factor": {
        "rope_scaling": {
            "type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 64,
            "attention_factor": 1.25,
        }
    },
    "longrope, grown": {
        "rope_scaling": {
            "rope_type": "longrope",
            "short_factor": [1.0] * 8,
            "long_factor": [1.0, 1.1, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0],
            "original_max_position_embeddings": 64,
        }
    },
    "longrope, not grown": {
        "rope_scaling": {
            "rope_type": "longrope",
            "short_factor": [1.0, 1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6],
            "long_factor": [8.0] * 8,
            "factor": 2.0,
            "attention_factor": 1.1,
            "original_max_position_embeddings": 256,
        }
    },
    "original length beside the other lengths": {
        "original_max_position_embeddings": 32,
        "rope_scaling": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64},
    },
}


@pytest.mark.parametrize("name", ROPES)
def test_llama_has_transformers_logits_with_every_kind_of_rope(name: str) -> None:
    made = by_transformers(LLAMA | ROPES[name])
    assert_close(whole_model(made.spec, made.weights).forward(prompt()), made.expected_logits(prompt()))
    assert from_config(made.model.config.to_dict()) == made.spec, "transformers 5 writes the same model differently"


@pytest.mark.parametrize(
    "changes",
    [
        {"num_key_value_heads": 4},
        {"num_key_value_heads": 1},
        {"num_attention_heads": 8, "num_key_value_heads": 2},
        {"head_dim": 40},
        {"tie_word_embeddings": True},
        {"hidden_size": 72, "num_attention_heads": 9, "num_key_value_heads": 3, "intermediate_size": 50},
    ],
    ids=str,
)
def test_llama_has_transformers_logits_in_every_shape(changes: dict[str, object]) -> None:
    made = by_transformers(LLAMA | changes, seed=1)
    assert_close(whole_model(made.spec, made.weights).forward(prompt(33)), made.expected_logits(prompt(33)))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"norm_topk_prob": False},
        {"mlp_only_layers": [1]},
        {"decoder_sparse_step": 2},
        {"num_experts_per_tok": 6},
        {"num_experts_per_tok": 1, "num_experts": 1},
        {"tie_word_embeddings": True, "num_key_value_heads": 4},
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}},
    ],
    ids=str,
)
def test_qwen3_moe_has_transformers_logits(changes: dict[str, object]) -> None:
    made = by_transformers(QWEN3_MOE | changes, seed=2)
    assert_close(whole_model(made.spec, made.weights).forward(prompt()), made.expected_logits(prompt()))
    assert from_config(made.model.config.to_dict()) == made.spec, "transformers 5 writes the same model differently"


def test_the_tensor_list_is_what_transformers_saves(tmp_path_factory: pytest.TempPathFactory) -> None:
    for config in (LLAMA, LLAMA | {"tie_word_embeddings": True}, QWEN3_MOE | {"mlp_only_layers": [0]}):
        made, folder = by_transformers(config), tmp_path_factory.mktemp("saved")
        made.model.save_pretrained(folder)
        with safe_open(folder / "model.safetensors", "pt") as file:
            saved = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        listed = registry.family(made.spec.family).tensors(made.spec)
        assert {t.name: t.shape for t in listed if not t.optional} == saved


@pytest.mark.parametrize("config", [LLAMA, QWEN3_MOE], ids=["llama", "qwen3_moe"])
def test_greedy_generation_with_a_cache_says_what_transformers_says(config: Mapping[str, object]) -> None:
    made = by_transformers(config, seed=3)
    tokens, logits = whole_model(made.spec, made.weights).generate_with_logits(prompt(20), 24)
    expected = made.expected_logits(prompt(20) + tokens)[19:-1]
    assert_close(logits, expected)
    assert tokens == logits.argmax(-1).tolist()
    best = expected.topk(2).values
    clear = best[:, 0] - best[:, 1] > 0.01
    assert clear.sum() > 12, "a test of near ties alone says nothing"
    assert [t for t, c in zip(tokens, clear, strict=True) if c] == expected.argmax(-1)[clear].tolist()


# Step-3, written down once more from the report and the published names, one token after the other, without any code
# of the product.


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * (x.pow(2).mean() + eps).rsqrt() * weight


def swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    a = gate @ x
    return down @ (a / (1 + torch.exp(-a)) * (up @ x))


def rotate(x: Tensor, position: int, theta: float) -> Tensor:
    half = x.shape[-1] // 2
    out = x.clone()
    for i in range(half):
        angle = position * theta ** (-2 * i / x.shape[-1])
        a, b = x[..., i], x[..., i + half]
        out[..., i] = a * math.cos(angle) - b * math.sin(angle)
        out[..., i + half] = b * math.cos(angle) + a * math.sin(angle)
    return out


def step3_logits(config: Mapping[str, object], w: Mapping[str, Tensor], token_ids: list[int]) -> Tensor:
    """Double precision, [tokens, vocab]."""
    w = {name: tensor.double() for name, tensor in w.items()}
    heads, dim = int(str(config["num_attention_heads"])), int(str(config["head_dim"]))
    eps, theta = float(str(config["rms_norm_eps"])), float(str(config["rope_theta"]))
    moe_layers = str(config["moe_layers_enum"]).split(",")
    cache: dict[int, list[tuple[Tensor, Tensor]]] = {i: [] for i in range(int(str(config["num_hidden_layers"])))}
    rows = []
    for position, token in enumerate(token_ids):
        h = w["model.embed_tokens.weight"][token]
        for layer, past in cache.items():
            p = f"model.layers.{layer}."
            x = rms(h, w[p + "input_layernorm.weight"], eps)
            low = rms(w[p + "self_attn.q_proj.weight"] @ x, w[p + "self_attn.inter_norm.weight"], eps)
            q = rotate((w[p + "self_attn.wq.weight"] @ low).view(heads, dim), position, theta)
            k = rotate(w[p + "self_attn.k_proj.weight"] @ x, position, theta)
            past.append((k, w[p + "self_attn.v_proj.weight"] @ x))
            keys, values = torch.stack([a for a, _ in past]), torch.stack([b for _, b in past])
            out = torch.cat([torch.softmax(keys @ head / math.sqrt(dim), 0) @ values for head in q])
            h = h + w[p + "self_attn.o_proj.weight"] @ out
            y = rms(h, w[p + "post_attention_layernorm.weight"], eps)
            if str(layer) in moe_layers:
                h = h + step3_moe(config, w, p, y)
            else:
                h = h + swiglu(y, *(w[f"{p}mlp.{x}_proj.weight"] for x in ("gate", "up", "down")))
        rows.append(w["lm_head.weight"] @ rms(h, w["model.norm.weight"], eps))
    return torch.stack(rows)


def step3_moe(config: Mapping[str, object], w: Mapping[str, Tensor], p: str, y: Tensor) -> Tensor:
    shares = torch.softmax(w[p + "moe.gate.weight"] @ y, 0)
    chosen = sorted(range(len(shares)), key=lambda e: -shares[e].item())[: int(str(config["moe_top_k"]))]
    total = sum(shares[e] for e in chosen) if config["norm_expert_weight"] else 1.0
    names = ("gate", "up", "down")
    delta = torch.zeros_like(y)
    if int(str(config["share_expert_dim"])):
        delta = swiglu(y, *(w[f"{p}share_expert.{x}_proj.weight"] for x in names))
    for e in chosen:
        delta = delta + shares[e] / total * swiglu(y, *(w[f"{p}moe.{x}_proj.weight"][e] for x in names))
    return delta


@pytest.mark.parametrize(
    "changes",
    [{}, {"norm_expert_weight": False}, {"moe_top_k": 12}, {"moe_layers_enum": "0,3"}, {"share_expert_dim": 0}],
    ids=str,
)
def test_step3_has_the_logits_of_a_plain_reference(changes: dict[str, object]) -> None:
    config = STEP3 | changes
    spec = from_config(config)
    weights = random_weights(spec)
    expected = step3_logits(config, weights, prompt(24))
    assert_close(whole_model(spec, weights).forward(prompt(24)), expected)


def test_a_gate_that_cannot_decide_takes_the_lowest_experts_in_the_whole_model() -> None:
    spec = from_config(QWEN3_MOE)
    weights = random_weights(spec)
    tied = {n: torch.zeros_like(w) if n.endswith("mlp.gate.weight") else w for n, w in weights.items()}
    pruned = {n: w * (".experts." not in n or any(f".experts.{e}." in n for e in (0, 1))) for n, w in tied.items()}
    assert torch.equal(whole_model(spec, tied).forward(prompt(9)), whole_model(spec, pruned).forward(prompt(9)))


@pytest.mark.parametrize("name", MODELS)
def test_bf16_halves_stay_near_float32(name: str) -> None:
    spec = from_config(MODELS[name])
    weights = {n: w.bfloat16() for n, w in random_weights(spec).items()}
    exact = whole_model(spec, {n: w.float() for n, w in weights.items()}).forward(prompt(12))
    found = whole_model(spec, weights).forward(prompt(12))
    assert found.dtype == torch.float32
    cosine = torch.nn.functional.cosine_similarity(found, exact, dim=-1)
    assert cosine.min() > 0.98, f"lowest cosine {cosine.min()}"


def test_transformers_and_ours_differ_when_a_weight_does() -> None:
    """The comparison above can fail."""
    made = by_transformers(LLAMA)
    bent = {n: w * 1.01 if n.endswith("0.self_attn.k_proj.weight") else w for n, w in made.weights.items()}
    with pytest.raises(AssertionError, match="relative error"):
        assert_close(whole_model(made.spec, bent).forward(prompt()), made.expected_logits(prompt()))
