from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from afd.errors import RequestError
from afd.rpc import attention_pb2 as pb
from afd.rpc.convert import (
    AttentionStatus,
    output_from_proto,
    output_to_proto,
    request_from_proto,
    request_to_proto,
    status_from_proto,
    status_to_proto,
)
from afd.types import GenerateOutput, GenerateRequest, SampledToken, SamplingParams

ids = st.integers(0, 2**32 - 1)
single = st.floats(width=32, allow_nan=False, allow_infinity=False)
ratio = st.floats(0, 1, width=32)

sampling = st.integers(0, 100).flatmap(
    lambda min_tokens: st.builds(
        SamplingParams,
        max_tokens=st.integers(max(1, min_tokens), 2**31),
        min_tokens=st.just(min_tokens),
        temperature=st.floats(0, 100, width=32),
        top_p=st.floats(0.125, 1, width=32),
        top_k=st.integers(0, 2**31),
        min_p=ratio,
        seed=st.none() | st.integers(0, 2**64 - 1),
        repetition_penalty=st.floats(0.125, 8, width=32),
        frequency_penalty=single,
        presence_penalty=single,
        ignore_eos=st.booleans(),
        stop_token_ids=st.lists(ids, max_size=3).map(tuple),
        logprobs=st.none() | st.integers(0, 20),
        prompt_logprobs=st.booleans(),
        logit_bias=st.dictionaries(ids, single, max_size=3).map(lambda biases: tuple(sorted(biases.items()))),
        allowed_token_ids=st.lists(ids, max_size=3).map(tuple),
        bad_words=st.lists(st.lists(ids, min_size=1, max_size=3).map(tuple), max_size=3).map(tuple),
    ).map(lambda made: replace(made, prompt_logprobs=made.prompt_logprobs and made.logprobs is not None))
)
requests = st.builds(
    GenerateRequest,
    st.text(min_size=1),
    st.lists(ids, min_size=1, max_size=9).map(tuple),
    sampling,
    st.integers(-(2**31), 2**31 - 1),
    st.text(),
    st.text(),
    st.lists(ids, max_size=5).map(tuple),
    st.booleans(),
)
tokens = st.one_of(
    st.builds(SampledToken, ids),
    st.builds(SampledToken, ids, single, st.lists(st.tuples(ids, single), max_size=3).map(tuple)),
)
outputs = st.builds(
    GenerateOutput,
    st.text(),
    st.lists(tokens, max_size=3).map(tuple),
    st.sampled_from([None, "stop", "length", "error", "cancelled"]),
    st.none() | ids,
    st.text(),
    st.booleans(),
    ids,
    st.sampled_from(["", "full", "unavailable"]),
    st.none() | st.floats(0, 1000, width=32),
    st.lists(tokens, max_size=3).map(tuple),
)


@given(requests)
def test_a_request_comes_out_of_its_message_as_it_went_in(request):
    wire = request_to_proto(request).SerializeToString()
    assert request_from_proto(pb.Submit.FromString(wire)) == request


@given(outputs)
def test_an_output_comes_out_of_its_message_as_it_went_in(output):
    wire = output_to_proto(output).SerializeToString()
    assert output_from_proto(pb.Output.FromString(wire)) == output


def test_a_status_comes_out_of_its_message_as_it_went_in():
    status = AttentionStatus(3, "draining", "it drains", *range(1, 16))
    assert status_from_proto(status_to_proto(status)) == status
    assert set(AttentionStatus.__slots__) == {field.name for field in pb.StatusReply.DESCRIPTOR.fields}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("min_tokens", 17),
        ("temperature", -1.0),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("min_p", -0.5),
        ("min_p", float("nan")),
        ("repetition_penalty", 0.0),
        ("frequency_penalty", float("nan")),
        ("presence_penalty", float("inf")),
        ("bad_words", ((),)),
        ("prompt_logprobs", True),
    ],
)
def test_a_message_outside_the_ranges_is_refused_by_field(field, value):
    message = request_to_proto(GenerateRequest("r", (1,), replace(SamplingParams(), **{field: value})))
    with pytest.raises(RequestError, match=field) as caught:
        request_from_proto(message)
    assert caught.value.param == field


def test_a_message_without_sampling_prompt_or_id_is_refused():
    good = request_to_proto(GenerateRequest("r", (1,), SamplingParams()))
    for field in ("request_id", "prompt_token_ids", "sampling"):
        message = pb.Submit()
        message.CopyFrom(good)
        message.ClearField(field)
        with pytest.raises(RequestError):
            request_from_proto(message)


def test_router_and_conversions_bring_in_neither_torch_nor_ray_nor_a_worker():
    modules = "router.app, afd.rpc.convert, afd.rpc.attention_client"
    script = f"import sys, {modules}; print(*sys.modules)"
    loaded = set(
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    )
    assert not loaded & {"torch", "ray", "transformers", "attention_worker", "ffn_worker"}
    script = "import sys, afd.rpc.convert; print(*sys.modules)"
    loaded = set(
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    )
    assert "grpc" not in loaded
