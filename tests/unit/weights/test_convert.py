"""The algebra of the re-expression, on one small random layer in float64, against the Llama formulas written out."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from afd.errors import UnsupportedModel
from afd.weights.convert import LlamaToStep3, Recipe

Array = npt.NDArray[np.float64]
HIDDEN, HEADS, GROUPS, DIM, INNER, TOKENS, THETA = 20, 6, 3, 8, 15, 7, 5000.0
CONFIG: dict[str, object] = {
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "num_hidden_layers": 3,
    "intermediate_size": INNER,
    "num_attention_heads": HEADS,
    "num_key_value_heads": GROUPS,
    "head_dim": DIM,
    "vocab_size": 50,
    "max_position_embeddings": 64,
    "rope_theta": THETA,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
}
RECIPE = Recipe(experts=4, top_k=2, dense_first=1, dense_last=1)


def llama_layer() -> dict[str, npt.NDArray[np.float32]]:
    rng = np.random.default_rng(0)
    shapes = {
        "input_layernorm": (HIDDEN,),
        "post_attention_layernorm": (HIDDEN,),
        "self_attn.q_proj": (HEADS * DIM, HIDDEN),
        "self_attn.k_proj": (GROUPS * DIM, HIDDEN),
        "self_attn.v_proj": (GROUPS * DIM, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HEADS * DIM),
        "mlp.gate_proj": (INNER, HIDDEN),
        "mlp.up_proj": (INNER, HIDDEN),
        "mlp.down_proj": (HIDDEN, INNER),
    }
    return {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def converted(layer: int) -> dict[str, npt.NDArray[np.float32]]:
    old = {f"model.layers.{layer}.{name}.weight": values for name, values in llama_layer().items()}
    new = LlamaToStep3.from_config(CONFIG, RECIPE).layer(layer, old.__getitem__)
    return {name.removeprefix(f"model.layers.{layer}.").removesuffix(".weight"): v for name, v in new.items()}


def rotate(x: Array, frequencies: Array) -> Array:
    """x [tokens, heads, dim], pairs (i, i + dim/2)."""
    angles = np.arange(TOKENS)[:, None, None] * frequencies
    first, second = np.split(x, 2, axis=-1)
    return np.concatenate(
        (first * np.cos(angles) - second * np.sin(angles), second * np.cos(angles) + first * np.sin(angles)), axis=-1
    )


def attention(q: Array, k: Array, v: Array) -> Array:
    """q [tokens, heads, dim], k and v [tokens, kv_heads, dim] -> [tokens, heads · dim], causal."""
    heads, dim = q.shape[1:]
    k, v = (np.repeat(x, heads // x.shape[1], axis=1) for x in (k, v))
    scores = np.einsum("ihd,jhd->hij", q, k) * dim**-0.5
    scores[:, ~np.tri(TOKENS, dtype=bool)] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("hij,jhd->ihd", weights, v).reshape(TOKENS, -1)


def silu(x: Array) -> Array:
    return x / (1 + np.exp(-x))


def swiglu(y: Array, gate: Array, up: Array, down: Array) -> Array:
    return (silu(y @ gate.T) * (y @ up.T)) @ down.T


def test_one_wide_head_attends_as_its_groups_did() -> None:
    x = np.random.default_rng(1).standard_normal((TOKENS, HIDDEN))
    old, new = llama_layer(), converted(0)
    frequencies = THETA ** -(np.arange(DIM // 2) / (DIM // 2))
    normed = x * old["input_layernorm"]
    q, k, v = ((normed @ old[f"self_attn.{n}_proj"].T).reshape(TOKENS, -1, DIM) for n in "qkv")
    expected = attention(rotate(q, frequencies), rotate(k, frequencies), v) @ old["self_attn.o_proj"].T

    scaling = LlamaToStep3.from_config(CONFIG, RECIPE).config()["rope_scaling"]
    assert isinstance(scaling, dict)
    pairs = GROUPS * DIM // 2
    wide = 1 / (np.array(scaling["long_factor"]) * THETA ** (np.arange(pairs) / pairs))
    wq = new["self_attn.wq"] @ new["self_attn.q_proj"]
    q, k, v = (
        (x @ w.T).reshape(TOKENS, -1, GROUPS * DIM) for w in (wq, new["self_attn.k_proj"], new["self_attn.v_proj"])
    )
    assert k.shape[1] == v.shape[1] == 1
    found = attention(rotate(q, wide), rotate(k, wide), v) @ new["self_attn.o_proj"].T
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()
    assert (new["input_layernorm"] == 1).all()
    assert (new["self_attn.inter_norm"] == 1).all()


@pytest.mark.parametrize("chosen", [(0, 1), (3, 2), (2, 2)])
def test_shared_expert_and_any_renormalised_choice_of_experts_add_up_to_the_dense_layer(
    chosen: tuple[int, int],
) -> None:
    y = np.random.default_rng(2).standard_normal((TOKENS, HIDDEN))
    old, new = llama_layer(), converted(1)
    expected = swiglu(y, *(old[f"mlp.{n}_proj"] for n in ("gate", "up", "down")))
    found = swiglu(y, *(new[f"share_expert.{n}_proj"] for n in ("gate", "up", "down")))
    for expert, weight in zip(chosen, (0.3, 0.7), strict=True):
        found += weight * swiglu(y, *(new[f"moe.{n}_proj"][expert] for n in ("gate", "up", "down")))
    assert np.abs(found - expected).max() < 1e-6 * np.abs(expected).max()
    assert new["share_expert.gate_proj"].shape == (5, HIDDEN)
    assert new["moe.down_proj"].shape == (4, HIDDEN, 10)


def test_the_gate_differs_from_layer_to_layer_and_not_from_run_to_run() -> None:
    assert np.array_equal(converted(1)["moe.gate"], converted(1)["moe.gate"])
    conversion = LlamaToStep3.from_config(CONFIG | {"num_hidden_layers": 4}, RECIPE)
    layer = {f"model.layers.2.{name}.weight": values for name, values in llama_layer().items()}
    other = conversion.layer(2, layer.__getitem__)["model.layers.2.moe.gate.weight"]
    assert not np.array_equal(other, converted(1)["moe.gate"])


def test_layers_at_both_ends_stay_dense_and_the_config_says_which_do_not() -> None:
    assert "mlp.up_proj" in converted(0)
    assert "moe.up_proj" in converted(1)
    assert "mlp.up_proj" in converted(2)
    config = LlamaToStep3.from_config(CONFIG | {"num_hidden_layers": 30}).config()
    assert config["moe_layers_enum"] == ",".join(str(i) for i in range(4, 29))
    assert (config["moe_num_experts"], config["moe_top_k"], config["norm_expert_weight"]) == (8, 2, True)


@pytest.mark.parametrize("change", [{"model_type": "qwen3_moe"}, {"rope_scaling": {"rope_type": "yarn"}}])
def test_a_model_the_algebra_does_not_cover_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(UnsupportedModel, match="can become a step3_text"):
        LlamaToStep3.from_config(CONFIG | change)
