"""Structured output, tools and reasoning over HTTP: what the workers are asked, and what of an answer goes where."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from llguidance import LLMatcher, LLTokenizer
from scripted_worker import EOS, MODEL

from router.settings import RouterSettings

CHAT = [{"role": "user", "content": "How is Paris?"}]
CITY = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "weather", "description": "Weather of a city.", "parameters": CITY}}
OTHER = {"type": "function", "function": {"name": "time"}}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
TOOL_TEMPLATE = (
    "{% for t in tools or [] %}{{ t.function.name }};{% endfor %}"
    "{% for m in messages %}{{ m.role }}:{{ m.content }}"
    "{% for c in m.tool_calls or [] %}[{{ c.function.name }} {{ c.function.arguments.city }}]{% endfor %}|{% endfor %}"
)
HISTORY = [
    *CHAT,
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}
        ],
    },
    {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
]


@pytest.fixture
def settings(settings: RouterSettings) -> RouterSettings:
    """With room for tools in the prompt."""
    return replace(settings, max_context=4096)


@pytest.fixture
def llg(settings: RouterSettings) -> LLTokenizer:
    return LLTokenizer(str(settings.tokenizer_json), n_vocab=settings.vocab_size, eos_token=2)


def ask(router, **fields):
    response = router.http.post("/v1/chat/completions", json={"model": MODEL, "messages": CHAT, **fields})
    assert response.status_code == 200, response.text
    return response.json()["choices"]


def chunks(router, **fields):
    """The choices of all chunks of a streamed answer."""
    with router.http.stream(
        "POST", "/v1/chat/completions", json={"model": MODEL, "messages": CHAT, "stream": True, **fields}
    ) as r:
        lines = [line.removeprefix("data: ") for line in r.iter_lines() if line]
    assert lines.pop() == "[DONE]"
    return [choice for line in lines for choice in json.loads(line)["choices"]]


def takes(llg: LLTokenizer, grammar: str, text: str) -> bool:
    """Whether `text` is a whole answer of `grammar`."""
    matcher = LLMatcher(llg, grammar, log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    ids = llg.tokenize_str(text, parse_special=True)
    return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()


def sent(worker) -> tuple[str, str]:
    """The grammar that the worker was sent, and the prompt's ids as text."""
    request = worker.submitted.get(timeout=10)
    return request.grammar, request.prompt_token_ids


@pytest.mark.parametrize(
    ("fields", "right", "wrong"),
    [
        ({"response_format": {"type": "json_object"}}, ['{"a": [1, null]}', "{}"], ["[1]", '{"a": ', '{"a":\n1}']),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "c", "schema": CITY, "strict": True}}},
            ['{"city": "x"}', '{"city":"x"}'],
            ['{"city": 1}', "{}", '{"city":  "x"}'],
        ),
        ({"guided_json": json.dumps(CITY)}, ['{"city": "x"}'], ["{}"]),
        ({"structured_outputs": {"json": CITY}}, ['{"city": "x"}'], ["{}"]),
        ({"structured_outputs": {"json_object": True}}, ["{}"], ["1"]),
        ({"guided_regex": "^[ab]+/\\d{2}$"}, ["ab/12"], ["ab/1", "c/12"]),
        ({"structured_outputs": {"regex": "[^x]\\n?"}}, ["é", "y\n"], ["x"]),
        ({"guided_choice": ['a"b\\n', "/é/"]}, ['a"b\\n', "/é/"], ["a", "é"]),
        ({"structured_outputs": {"choice": ["yes", "no"]}}, ["yes", "no"], ["yesno"]),
        ({"guided_grammar": 'start: "<" start ">" | "x"'}, ["x", "<<x>>"], ["<x"]),
        ({"tools": [TOOL], "tool_choice": "required"}, [CALL, f"{CALL}\n{CALL}"], ["hi", CALL.replace("city", "town")]),
        ({"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False}, [CALL], [f"{CALL}\n{CALL}"]),
        (
            {"tools": [TOOL, OTHER], "tool_choice": {"type": "function", "function": {"name": "time"}}},
            ['<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>'],
            [CALL],
        ),
        ({"tools": [TOOL], "guided_regex": "a+"}, ["aa", CALL], ["b"]),
        ({"tools": [TOOL], "tool_choice": "none", "guided_regex": "a+"}, ["aa"], [CALL]),
    ],
)
def test_a_request_becomes_a_grammar_that_takes_the_right_answers(router, worker, llg, fields, right, wrong) -> None:
    ask(router, **fields)
    grammar, _ = sent(worker)
    assert [text for text in right if not takes(llg, grammar, text)] == []
    assert [text for text in wrong if takes(llg, grammar, text)] == []


@pytest.mark.parametrize("path", ["chat/completions", "completions"])
def test_as_many_choices_as_there_may_be_can_be_followed(router, worker, llg, path) -> None:
    prompt = {"messages": CHAT} if "chat" in path else {"prompt": "hi"}
    body = {"model": MODEL, **prompt, "guided_choice": [f"c{i}" for i in range(4097)]}
    error = router.http.post(f"/v1/{path}", json=body).json()["error"]
    assert error["param"] == "guided_choice"
    assert "4096" in error["message"]
    body["guided_choice"].pop()
    response = router.http.post(f"/v1/{path}", json=body)
    assert response.status_code == 200, response.text
    grammar, _ = sent(worker)
    assert takes(llg, grammar, "c4095")
    assert not takes(llg, grammar, "c4096")


def test_a_request_without_such_fields_has_no_grammar(router, worker) -> None:
    ask(router, tools=[TOOL], response_format={"type": "text"})
    assert sent(worker)[0] == ""


def test_step3s_calls_are_forced_in_its_own_format(start, settings, worker, llg) -> None:
    ask(start(replace(settings, tool_parser="step3"), worker), tools=[TOOL, OTHER], tool_choice="required")
    grammar, _ = sent(worker)
    bar = "\N{FULLWIDTH VERTICAL LINE}"
    body = '<steptml:invoke name="weather"><steptml:parameter name="city">Paris</steptml:parameter></steptml:invoke>'
    text = f"<{bar}tool_calls_begin{bar}><{bar}tool_call_begin{bar}>function<{bar}tool_sep{bar}>{body}"
    text += f"<{bar}tool_call_end{bar}><{bar}tool_calls_end{bar}>"
    assert takes(llg, grammar, text)
    assert not takes(llg, grammar, text.replace("city", "town"))


@pytest.mark.parametrize(
    ("parameters", "sentence"),
    [
        ({"properties": {'a"b': {"type": "string"}}}, "the parameter 'a\"b', and a name in it cannot have"),
        ({"properties": {"a<b": {"type": "integer"}}}, "the parameter 'a<b', and a name in it cannot have"),
        (
            {"properties": {"a": {"type": "string", "enum": ["x</steptml:parameter>"]}}},
            "the parameter 'a' whose schema has </steptml:parameter>",
        ),
        (
            {"properties": {"a": {"type": "array", "items": {"const": "</steptml:parameter>"}}}},
            "the parameter 'a' whose schema has </steptml:parameter>",
        ),
        ({"properties": {"a": {}}, "required": ["a", "b"]}, "the required parameter 'b', which is not among"),
        ({"required": ["b"]}, "the required parameter 'b', which is not among"),
    ],
)
def test_a_function_that_step3s_format_cannot_force_is_refused(start, settings, worker, parameters, sentence) -> None:
    router = start(replace(settings, tool_parser="step3"), worker)
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", **parameters}}}
    body = {"model": MODEL, "messages": CHAT, "tools": [TOOL, tool]}
    for choice in ("required", {"type": "function", "function": {"name": "f"}}):
        answer = router.http.post("/v1/chat/completions", json={**body, "tool_choice": choice})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "tools")
        assert f"the function f cannot be forced in the format step3: it has {sentence}" in answer.text.replace(
            '\\"', '"'
        )
    assert worker.submitted.empty()
    ask(router, tools=[TOOL, tool])
    ask(router, tools=[TOOL, tool], tool_choice={"type": "function", "function": {"name": "weather"}})


@pytest.mark.parametrize("parser", ["step3", "deepseek_r1"])
def test_reasoning_comes_before_the_grammar(start, settings, worker, llg, parser) -> None:
    ask(start(replace(settings, reasoning_parser=parser), worker), guided_regex="a+")
    grammar, _ = sent(worker)
    assert takes(llg, grammar, f"{'' if parser == 'step3' else '<think>'}b, {{ or c?</think>\n\naa")
    assert takes(llg, grammar, "aa") == (parser == "deepseek_r1")
    assert not takes(llg, grammar, "<think>hm</think>b")


def test_a_call_is_told_apart_and_streamed_in_openais_shape(router, worker, say) -> None:
    worker.script = say(f"Let me see.\n{CALL}")
    (choice,) = ask(router, tools=[TOOL])
    (call,) = choice["message"].pop("tool_calls")
    assert choice["message"] == {"role": "assistant", "content": "Let me see."}
    assert call["function"] == {"name": "weather", "arguments": '{"city": "Paris"}'}
    assert (choice["finish_reason"], call["type"]) == ("tool_calls", "function")
    pieces = chunks(router, tools=[TOOL])
    assert pieces[-1]["finish_reason"] == "tool_calls"
    assert "".join(p["delta"].get("content", "") for p in pieces) == "Let me see."
    first, *rest = [c for p in pieces for c in p["delta"].get("tool_calls", ())]
    assert (first["index"], first["type"], first["function"]) == (0, "function", {"name": "weather", "arguments": ""})
    assert first["id"].startswith("call_")
    assert first["id"] != call["id"]
    assert len(rest) > 2
    assert all(set(piece) == {"index", "function"} for piece in rest)
    assert "".join(piece["function"]["arguments"] for piece in rest) == '{"city": "Paris"}'


def test_the_openai_client_follows_a_conversation_with_calls(router, worker, say) -> None:
    worker.script = say(CALL)
    answer = router.openai.chat.completions.create(model=MODEL, messages=CHAT, tools=[TOOL])
    message = answer.choices[0].message
    assert message.content is None
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "sunny"}
    worker.script = say("Sunny.")
    answer = router.openai.chat.completions.create(model=MODEL, messages=[*CHAT, message, result], tools=[TOOL])
    assert answer.choices[0].message.content == "Sunny."
    assert answer.choices[0].finish_reason == "stop"


def test_calls_that_nobody_asked_for_stay_text(router, worker, say) -> None:
    worker.script = say(CALL)
    for fields in ({}, {"tools": [TOOL], "tool_choice": "none"}):
        (choice,) = ask(router, **fields)
        assert choice["message"] == {"role": "assistant", "content": CALL}
        assert choice["finish_reason"] == "stop"


def test_an_answer_cut_off_in_a_call_says_so(router, worker, say) -> None:
    worker.script = say(CALL)
    (choice,) = ask(router, tools=[TOOL], max_tokens=len(worker.script.token_ids) - 20)
    assert choice["finish_reason"] == "length"
    assert choice["message"]["tool_calls"][0]["function"]["name"] == "weather"


@pytest.mark.parametrize("said", ["<tool_call", "<", f"{CALL}\n<tool"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_call_cut_off_in_its_tag_is_not_content(router, worker, say, said, stream) -> None:
    worker.script = say(said, "length")
    if stream:
        deltas = [choice["delta"] for choice in chunks(router, tools=[TOOL], tool_choice="required")]
        assert not any(delta.get("content") for delta in deltas)
    else:
        (choice,) = ask(router, tools=[TOOL], tool_choice="required")
        assert not choice["message"]["content"]
        assert choice["finish_reason"] == "length"


def test_text_that_only_looks_like_a_tag_stays_content_where_nobody_has_to_call(router, worker, say) -> None:
    worker.script = say("a <tool", "length")
    (choice,) = ask(router, tools=[TOOL])
    assert choice["message"]["content"] == "a <tool"


def test_reasoning_has_a_field_of_its_own(start, settings, worker, say) -> None:
    router = start(replace(settings, reasoning_parser="step3"), worker)
    worker.script = say("Paris, é…\n</think>\n\nIt is sunny.")
    (choice,) = ask(router)
    assert choice["message"] == {"role": "assistant", "content": "It is sunny.", "reasoning_content": "Paris, é…"}
    pieces = [piece["delta"] for piece in chunks(router)]
    assert "".join(p.get("reasoning_content", "") for p in pieces) == "Paris, é…"
    assert "".join(p.get("content", "") for p in pieces) == "It is sunny."


def test_logprobs_and_token_ids_stand_beside_what_is_held_back(router, worker, say) -> None:
    worker.script = say(CALL)
    fields = {"tools": [TOOL], "logprobs": True, "return_token_ids": True}
    (choice,) = ask(router, **fields)
    assert choice["token_ids"] == worker.script.token_ids
    pieces = chunks(router, **fields)
    assert [t for p in pieces for t in p.get("token_ids", ())] == worker.script.token_ids
    assert sum(len(p["logprobs"]["content"]) for p in pieces if p["logprobs"]) == len(worker.script.token_ids)


@pytest.mark.parametrize("special", [False, True])
def test_tags_that_are_special_tokens_are_read_and_forced(start, settings, worker, tmp_path, special) -> None:
    """DeepSeek's tokenizer has </think> as a token, others as plain text."""
    from tokenizers import AddedToken, Tokenizer

    tokenizer = Tokenizer.from_file(str(settings.tokenizer_json))
    if special:
        tokenizer.add_special_tokens([AddedToken("</think>", special=True)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    router = start(replace(settings, tokenizer_json=tmp_path / "tokenizer.json", reasoning_parser="step3"), worker)
    worker.script.token_ids = tokenizer.encode("hm</think>yes").ids
    (choice,) = ask(router, guided_choice=["yes"])
    assert choice["message"] == {"role": "assistant", "content": "yes", "reasoning_content": "hm"}
    llg = LLTokenizer(str(tmp_path / "tokenizer.json"), n_vocab=512, eos_token=tokenizer.token_to_id(EOS))
    assert takes(llg, sent(worker)[0], "hm</think>yes")


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"tools": [TOOL, OTHER]}, "weather;time;user:How is Paris?|assistant:[weather Paris]|tool:sunny|"),
        ({"tools": [TOOL], "tool_choice": "none"}, "user:How is Paris?|assistant:[weather Paris]|tool:sunny|"),
    ],
)
def test_a_template_that_knows_tools_gets_them(start, settings, worker, tokenizer, fields, expected) -> None:
    router = start(replace(settings, tokenizer_config={"chat_template": TOOL_TEMPLATE}), worker)
    ask(router, messages=HISTORY, **fields)
    assert tokenizer.decode(sent(worker)[1], special=True) == expected


def test_for_a_template_that_does_not_tools_become_text(router, worker, tokenizer) -> None:
    ask(router, messages=[{"role": "system", "content": "Be brief."}, *HISTORY], tools=[TOOL])
    system, user, assistant, result, _ = tokenizer.decode(sent(worker)[1], special=True).split("<|im_start|>")[1:]
    assert system.startswith("system\nBe brief.\n\n")
    assert json.dumps(TOOL) in system
    assert user == "user\nHow is Paris?<|im_end|>\n"
    assert assistant == f"assistant\n{CALL}<|im_end|>\n"
    assert result == "user\n<tool_response>\nsunny\n</tool_response><|im_end|>\n"
