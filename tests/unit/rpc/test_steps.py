from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from afd.rpc import attention_pb2 as pb
from afd.rpc.convert import output_from_proto
from afd.rpc.steps import StepWriter
from afd.types import GenerateOutput, SampledToken

NAMES = ("a", "b", "c")
ids = st.integers(0, 2**32 - 1)
tokens = st.builds(SampledToken, ids) | st.builds(SampledToken, ids, st.just(-0.5), st.just(((3, -1.0),)))
outputs = st.builds(
    GenerateOutput,
    st.sampled_from(NAMES),
    st.lists(tokens, max_size=2).map(tuple),
    st.sampled_from([None, None, None, "stop", "error"]),
    st.none() | ids,
    st.sampled_from(["", "", "broken"]),
    st.booleans(),
    st.sampled_from([0, 0, 9]),
)
ordinary = st.builds(GenerateOutput, st.sampled_from(NAMES), st.builds(SampledToken, ids).map(lambda token: (token,)))


def read(step, names):
    """What a reader who knows the handles makes of a step."""
    step = pb.StepOutputs.FromString(step.SerializeToString())
    columns = zip(step.handles, step.token_ids, strict=True)
    return [GenerateOutput(names[handle], (SampledToken(token_id),)) for handle, token_id in columns] + [
        output_from_proto(output) for output in step.outputs
    ]


@given(st.lists(st.lists(ordinary | outputs, max_size=6), max_size=4), st.sets(st.sampled_from(NAMES)))
def test_every_request_reads_its_outputs_in_order_with_a_handle_or_without(steps, with_handle):
    writer, handles = StepWriter(), {name: index for index, name in enumerate(NAMES, 7)}
    for name in with_handle:
        writer.opened(name, handles[name])
    names = {handle: name for name, handle in handles.items()}
    read_back = [output for step in steps for output in read(writer.write(step), names)]
    for name in NAMES:
        written = [output for step in steps for output in step if output.request_id == name]
        assert [output for output in read_back if output.request_id == name] == written


def test_ordinary_tokens_are_columns_until_the_request_ends():
    writer = StepWriter()
    writer.opened("a", 5)
    writer.opened("a", 6)  # in use: the engine will refuse it
    token = GenerateOutput("a", (SampledToken(9),))
    step = writer.write([token])
    assert (list(step.handles), list(step.token_ids), list(step.outputs)) == ([5], [9], [])
    writer.write([GenerateOutput("a", (), "length")])
    step = writer.write([token])
    assert (list(step.handles), len(step.outputs)) == ([], 1)


def test_without_a_handle_or_after_its_end_a_request_is_written_in_full():
    writer = StepWriter()
    writer.opened("a", 0)
    writer.opened("b", 1)
    writer.closed("b")
    writer.closed("unknown")
    step = writer.write([GenerateOutput(name, (SampledToken(9),)) for name in "ab"])
    assert (list(step.handles), [output.request_id for output in step.outputs]) == ([], ["a", "b"])
