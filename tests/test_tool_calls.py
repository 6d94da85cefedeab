"""Tool calls out of text that arrives piece by piece: what is one, what is none and why."""

from __future__ import annotations

import codecs
import json
import random
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import edgeq
from edgeq.hub import DEMO
from edgeq.text.detokenizer import StreamingDetokenizer
from edgeq.text.template import ChatTemplate
from edgeq.text.tokenizer import Tokenizer
from edgeq.text.tool_calls import MalformedCall, ToolCall, ToolCallParser, ToolForm, tool_form

TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string"},
                    "days": {"type": "integer"},
                    "share": {"type": "number"},
                    "exact": {"type": "boolean"},
                    "where": {"$ref": "#/$defs/place"},
                    "names": {"type": "array", "items": {"type": "string"}},
                    "unit": {"enum": ["C", "F"]},
                    "limit": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
                    "mixed": {"type": ["number", "string"]},
                    "free": {},
                },
                "$defs": {"place": {"type": "object"}},
            },
        },
    },
    {"name": "write_file", "parameters": {"type": "object", "properties": {"path": {"type": "string"}, "text": {}}}},
    {"type": "function", "function": {"name": "now"}},
]
JSON_TEMPLATE = """{% for m in messages %}{{ m.role }}:{{ m.content }}{% for c in m.tool_calls %}<tool_call>
{{ {"name": c.function.name, "arguments": c.function.arguments} | tojson }}
</tool_call>{% endfor %}{% endfor %}"""


class Read(NamedTuple):
    text: str
    calls: list[ToolCall]
    malformed: list[MalformedCall]


def read(pieces: Iterable[str], form: ToolForm = "xml", tools: Sequence[dict[str, Any]] = TOOLS) -> Read:
    """What a parser makes of a text in pieces; all of its characters come out again, in order."""
    parser, pieces = ToolCallParser(form, tools), list(pieces)
    segments = [segment for piece in pieces for segment in parser.push(piece)] + parser.flush()
    assert "".join(segment.text for segment in segments) == "".join(pieces)
    assert all(segment.text for segment in segments)
    return Read("".join(s.text for s in segments if s.channel == "answer"), parser.calls, parser.malformed)


def xml(name: str, **arguments: str) -> str:
    body = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in arguments.items())
    return f"<tool_call>\n<function={name}>\n{body}</function>\n</tool_call>"


def weather(key: str, value: str) -> Any:
    """The argument of a call with one parameter, or why it is malformed."""
    found = read([xml("get_weather", **{key: value})])
    return found.calls[0].arguments[key] if found.calls else found.malformed[0].reason


class TestCalls:
    def test_as_the_template_writes_it(self) -> None:
        found = read([xml("get_weather", city="Rome", days="3")])
        assert found == ("", [ToolCall("call_1", "get_weather", {"city": "Rome", "days": 3})], [])

    def test_as_openai_has_it(self) -> None:
        (call,) = read([xml("get_weather", city="Öland")]).calls
        assert call.message() == {
            "id": "call_1",
            "type": "function",
            "function": {"name": "get_weather", "arguments": '{"city": "Öland"}'},
        }

    def test_several_with_words_before(self) -> None:
        found = read(["Let me look.\n\n" + xml("get_weather", city="Rome") + "\n" + xml("now")])
        assert found.text == "Let me look."
        assert [(call.id, call.name) for call in found.calls] == [("call_1", "get_weather"), ("call_2", "now")]

    def test_words_between_and_after(self) -> None:
        assert read(["a\n" + xml("now") + "\nb\n" + xml("now") + "\n"]).text == "a\nb"
        assert read([xml("now") + "\n\nb"]).text == "b"

    @pytest.mark.parametrize(
        "text",
        [
            "<tool_call><function=get_weather><parameter=city>Rome</parameter></function></tool_call>",
            '<tool_call>\n\n<function="get_weather"> <parameter= city >\nRome\n</parameter></function>\n\n</tool_call>',
        ],
    )
    def test_other_white_space(self, text: str) -> None:
        assert read([text]).calls == [ToolCall("call_1", "get_weather", {"city": "Rome"})]

    @pytest.mark.parametrize(
        "value",
        [
            "", " ", "\n", "a\n\nb\n", "</tool_call>", "<tool_call>", "a </parameter> b", "</parameter>\n</parameter>",
            "</function>\n</tool_call>", "<function=now>", "if a < b and c > d:", "<p>\n</p>", "<parameter=", "ö 😀",
            '{"a": [1, "</tool_call>"]}', "see <parameter=x> there", "<tool_call> is\n a tag",
        ],
    )  # fmt: skip
    def test_whatever_a_value_holds(self, value: str) -> None:
        assert read([xml("write_file", path=value)]).calls == [ToolCall("call_1", "write_file", {"path": value})]

    def test_no_parameters(self) -> None:
        assert read(["<tool_call>\n<function=now>\n</function>\n</tool_call>"]).calls == [ToolCall("call_1", "now", {})]

    def test_without_calls_nothing_changes(self) -> None:
        text = "\n 1 < 2 <tool_calls> </tool_call> <functions=now>\n\n"
        assert read([text]) == (text, [], [])


class TestMalformed:
    @pytest.mark.parametrize(
        ("text", "reason"),
        [
            ("<tool_call>", "the reply ended within the call"),
            ("<tool_call>\n<function=get_weather>\n<parameter=city>\nRome", "the reply ended within the call"),
            (xml("get_weather", city="Rome")[:-1], "the reply ended within the call"),
            ("Write <tool_call> and then", "'a' stands where <function= should begin"),
            ('<tool_call>\n{"name": "now"}\n</tool_call>', "'{' stands where <function= should begin"),
            ("<tool_call>\n<function=>\n</function>\n</tool_call>", "a function without a name"),
            ("<tool_call>\n<function=now\n</function>\n</tool_call>", "the name of a function is not closed"),
            ("<tool_call>\n<function=now>\n</tool_call>", "'<' stands where <parameter= or </function> should begin"),
            ("<tool_call>\n<function=now>\n</function>\nThanks", "'T' stands where </tool_call> should begin"),
            (xml("now").removeprefix("<tool_call>\n"), "a function stands outside of <tool_call>"),
            (xml("get_wether", city="Rome"), "the function 'get_wether' was not offered"),
            (xml("get_weather", days="soon"), "the parameter 'days' is 'soon', expected integer"),
            (
                "<tool_call><function=get_weather><parameter=city>\nRome\n<parameter=days>\n3\n</parameter></function>"
                "</tool_call>",
                "the parameter 'city' is not closed",
            ),
            (
                "<tool_call><function=get_weather><parameter=city>Rome<parameter=days>3</parameter></function>"
                "</tool_call>",
                "the parameter 'city' is not closed",
            ),
            (
                xml("get_weather", city="Rome").replace(
                    "</function>", "<parameter=city>\nOslo\n</parameter>\n</function>"
                ),
                "the parameter 'city' is given twice",
            ),
        ],
    )
    def test_comes_back_as_text(self, text: str, reason: str) -> None:
        found = read([text])
        assert found.text == text
        assert not found.calls
        assert [malformed.reason for malformed in found.malformed] == [reason]
        assert text.startswith(found.malformed[0].text) or found.malformed[0].text in text

    def test_the_next_call_counts(self) -> None:
        broken = "<tool_call>\n<function=get_weather>\n<parameter=city>\nRome\nSorry:\n"
        found = read([broken + xml("now")])
        assert found.text == broken
        assert [call.name for call in found.calls] == ["now"]
        assert [malformed.reason for malformed in found.malformed] == ["the parameter 'city' is not closed"]

    def test_without_descriptions_any_function_will_do(self) -> None:
        assert read([xml("anything", a="1")], tools=[]).calls == [ToolCall("call_1", "anything", {"a": "1"})]


class TestTypes:
    @pytest.mark.parametrize(
        ("key", "text", "value"),
        [
            ("city", "12", "12"), ("city", '{"a": 1}', '{"a": 1}'), ("city", "null", "null"),
            ("days", "12", 12), ("days", " -3 ", -3), ("days", "4.0", 4), ("days", "1" * 40, int("1" * 40)),
            ("share", "0.5", 0.5), ("share", "3", 3), ("share", "1e3", 1000.0),
            ("exact", "true", True), ("exact", "False", False),
            ("where", '{"at": [1, {"b": null}]}', {"at": [1, {"b": None}]}),
            ("names", '["a", "b"]', ["a", "b"]), ("unit", "C", "C"), ("unit", "K", "K"),
            ("limit", "3", 3), ("limit", "null", None), ("limit", "None", None), ("mixed", "3", 3), ("mixed", "x", "x"),
            ("free", "3", "3"), ("free", '{"a": 3}', {"a": 3}), ("free", "{a: 3}", "{a: 3}"), ("free", "[1]", [1]),
            ("unknown", "3", "3"), ("unknown", "[1]", [1]),
            ("where", '{"a": "\\ud800"}', {"a": "\ufffd"}), ("where", '{"a": "\\ud83d\\ude00"}', {"a": "😀"}),
        ],
    )  # fmt: skip
    def test_of_the_schema(self, key: str, text: str, value: Any) -> None:
        found = weather(key, text)
        assert found == value
        assert type(found) is type(value)

    @pytest.mark.parametrize(
        ("key", "text", "expected"),
        [
            ("days", "3.5", "integer"), ("days", "1" * 5000, "integer"), ("days", "³", "integer"),
            ("share", "nan", "number"), ("share", "1e999", "number"), ("share", "1_0", "number"),
            ("exact", "1", "boolean"), ("where", "[1]", "object"), ("where", '{"a": NaN}', "object"),
            ("names", '["a"', "array"), ("names", "[" * 100_000, "array"), ("names", "[" * 40 + "]" * 40, "array"),
            ("limit", "x", "integer or null"),
        ],
    )  # fmt: skip
    def test_what_does_not_fit(self, key: str, text: str, expected: str) -> None:
        assert str(weather(key, text)).endswith(f"expected {expected}")

    @pytest.mark.parametrize(
        "parameters",
        [
            None, 3, [], {"properties": 3}, {"properties": {"x": 3}}, {"properties": {"x": {"type": 3}}},
            {"properties": {"x": {"type": "str"}}}, {"properties": {"x": {"enum": []}}},
            {"properties": {"x": {"$ref": "#/properties/x"}}}, {"properties": {"x": {"$ref": "http://elsewhere"}}},
            {"properties": {"x": {"anyOf": [3, {"type": "integer"}]}}}, {"properties": {"x": {"allOf": [{}]}}},
        ],
    )  # fmt: skip
    def test_schemas_that_say_nothing(self, parameters: Any) -> None:
        assert read([xml("f", x="3")], tools=[{"name": "f", "parameters": parameters}]).calls[0].arguments == {"x": "3"}


_NEEDED = 'the JSON needs a "name", which is text, and "arguments", which are an object'


class TestJson:
    @pytest.mark.parametrize(
        "call",
        [
            {
                "name": "get_weather",
                "arguments": {"city": "Rome", "days": 3, "where": {"a": [1, {"}": "</tool_call>"}]}},
            },
            {"name": "get_weather", "arguments": {"city": '"\\', "names": ["{", "\n", "é"]}},
        ],
    )
    def test_calls(self, call: dict[str, Any]) -> None:
        found = read([f"a\n<tool_call>\n{json.dumps(call)}\n</tool_call>"], "json")
        assert found == ("a", [ToolCall("call_1", call["name"], call["arguments"])], [])

    def test_arguments_may_be_text_or_missing(self) -> None:
        assert read(['<tool_call>{"name": "now"}</tool_call>'], "json").calls[0].arguments == {}
        text = '<tool_call>{"name": "now", "arguments": "{\\"a\\": 1}"}</tool_call>'
        assert read([text], "json").calls[0].arguments == {"a": 1}

    @pytest.mark.parametrize(
        ("inside", "reason"),
        [
            ('{"name": "now", "arguments": {}', "an object in the JSON is not closed"),
            ('{"name": "now', "a text in the JSON is not closed"),
            ('{"name": "now\n"}', "a text in the JSON is not closed"),
            ("{'name': 'now'}", "what is between the tags is not JSON"),
            ('{"name": 3}', _NEEDED),
            ('{"name": "now", "arguments": [1]}', _NEEDED),
            ('{"name": "then"}', "the function 'then' was not offered"),
            ('{"name": "now"} and', "'a' stands where </tool_call> should begin"),
            ('{"a": ' * 50_000 + "1" + "}" * 50_000, "what is between the tags is not JSON"),
            ("<function=now>", "'<' stands where { should begin"),
        ],
    )  # fmt: skip
    def test_what_is_none(self, inside: str, reason: str) -> None:
        text = f"<tool_call>\n{inside}\n</tool_call>"
        found = read([text], "json")
        assert (found.text, found.calls) == (text, [])
        assert [malformed.reason for malformed in found.malformed] == [reason]


TEMPLATES: dict[ToolForm, ChatTemplate] = {
    "xml": ChatTemplate.from_folder(DEMO),
    "json": ChatTemplate(JSON_TEMPLATE),
}


class TestForm:
    @pytest.mark.parametrize("form", TEMPLATES)
    def test_of_a_template(self, form: ToolForm) -> None:
        assert tool_form(TEMPLATES[form]) == form

    @pytest.mark.parametrize("source", ["{{ messages[0].content }}", "{{ raise_exception('no') }}"])
    def test_templates_that_do_not_say(self, source: str) -> None:
        assert tool_form(ChatTemplate(source)) == "xml"

    @settings(max_examples=60)
    @given(
        st.dictionaries(
            st.sampled_from(["path", "a", "b"]),
            st.text(st.characters(codec="utf-8"), max_size=20).filter(lambda text: "<" not in text)
            | st.dictionaries(st.text("ab{}\"'", max_size=3), st.integers() | st.booleans() | st.none(), max_size=2),
        )
    )
    def test_what_the_template_writes_is_read(self, arguments: dict[str, Any]) -> None:
        for form, template in TEMPLATES.items():
            call = {"type": "function", "function": {"name": "write_file", "arguments": arguments}}
            said = {"role": "assistant", "content": "", "tool_calls": [call]}
            text = template.render([{"role": "user", "content": "?"}, said], add_generation_prompt=False)
            found = read([text[text.index("<tool_call>") :]], form, [])
            assert [(call.name, call.arguments) for call in found.calls] == [("write_file", arguments)]


class TestReply:
    """The demo model calls what it is offered; with which arguments is another matter."""

    @pytest.fixture
    def chat(self) -> edgeq.Chat:
        weather = {"name": "get_weather", "description": "The weather in a city.", "parameters": {
            "type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}  # fmt: skip
        return edgeq.load("demo").chat(tools=[{"type": "function", "function": weather}], temperature=0.0)

    @pytest.mark.parametrize("thinking", [False, True])
    def test_a_call_and_its_answer(self, chat: edgeq.Chat, thinking: bool) -> None:
        chat.thinking = thinking
        reply = chat.send("What is the weather in Rome?")
        pieces = [*reply]
        (call,) = reply.tool_calls
        assert (call.name, call.arguments, reply.text) == ("get_weather", {"city": "Rome"}, "")
        assert [piece.text for piece in pieces if piece.channel == "tool_call" and piece.text] == [
            "<tool_call>\n<function=get_weather>\n<parameter=city>\nRome\n</parameter>\n</function>\n</tool_call>"
        ]
        assert [piece.token for piece in pieces if piece.token is not None] == reply.ids
        assert chat.messages[-1]["tool_calls"] == [call.message()]
        answer = chat.send_tool_results({call.id: '{"sky": "sunny", "degrees": 21}'})
        assert "21 degrees" in "".join(piece.text for piece in answer if piece.channel == "answer")
        assert not answer.tool_calls
        again = chat.send("What is the weather in Oslo?")
        assert [*again]
        assert again.tool_calls[0].id != call.id

    def test_left_in_its_middle_it_is_text(self, chat: edgeq.Chat) -> None:
        reply = chat.send("What is the weather in Rome?")
        for _ in range(6):
            next(reply)
        reply.close()
        assert reply.text.startswith("<tool_call>\n<func")
        assert [malformed.reason for malformed in reply.malformed_calls] == ["the reply ended within the call"]
        assert not reply.tool_calls

    def test_a_stop_string_cuts_a_call_too(self, chat: edgeq.Chat) -> None:
        chat.options = {**chat.options, "stop": ("Ro",)}
        reply = chat.send("What is the weather in Rome?")
        assert [*reply]
        assert reply.text.endswith("<parameter=city>\n")
        assert len(reply.malformed_calls) == 1

    def test_without_tools_it_is_text(self) -> None:
        chat = edgeq.load("demo").chat(temperature=0.0, max_tokens=5)
        reply = chat.send("?", assistant_prefix="<tool_call>\n<function=")
        assert [*reply]
        assert not reply.malformed_calls


# --- however it is cut -----------------------------------------------------------------------------------------------

FRAGMENTS = [
    "<tool_call>", "</tool_call>", "<function=get_weather>", "<function=now>", "</function>", "<parameter=city>",
    "<parameter=days>", "</parameter>", "\n", " ", "3", "Rome", "<", ">", "=", '{"name": "now"', "}", '"', "\\", "ö",
    "😀", "[", ":", xml("now"), xml("get_weather", city="Rome", days="3"), '{"name": "now", "arguments": {"a": "b"}}',
]  # fmt: skip


def in_pieces(text: str, cuts: random.Random) -> list[str]:
    places = sorted(cuts.choices(range(len(text) + 1), k=cuts.randrange(1, 12)))
    return [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]


def as_bytes(text: str) -> list[str]:
    """The text a byte at a time, as a streaming decoder gives it."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    return [decoder.decode(bytes([byte])) for byte in text.encode()]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(DEMO)


@settings(max_examples=300)
@given(st.lists(st.sampled_from(FRAGMENTS), max_size=14).map("".join), st.sampled_from(["xml", "json"]))
@example("a <tool_call>\n<function=now>\n<tool_call>\n<function=now>\n</function>\n</tool_call>", "xml")
def test_by_byte_by_token_or_at_once(tokenizer: Tokenizer, text: str, form: ToolForm) -> None:
    once, stream = read([text], form), StreamingDetokenizer(tokenizer)
    assert read(as_bytes(text), form) == once
    assert read([stream.push(token) for token in tokenizer.encode(text, control=True)], form) == once
    assert read(in_pieces(text, random.Random(text)), form) == once


def test_ten_thousand_mutated_texts() -> None:
    rng, forms = random.Random(0), list(TEMPLATES)
    seeds = [
        "I look.\n\n" + xml("get_weather", city="Rome", days="3", where='{"a": [1, 2]}') + "\n" + xml("now"),
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Ro\\"me", "days": [1, {"a": 2}]}}\n</tool_call>',
        xml("write_file", path="a.py", text="if a < b:\n    print('</parameter>')\n"),
    ]
    calls = 0
    for n in range(10_000):
        text, form = seeds[n % len(seeds)], forms[n // len(seeds) % 2]
        for _ in range(rng.randrange(1, 4)):
            a, b = sorted(rng.choices(range(len(text) + 1), k=2))
            b = min(b, a + rng.randrange(1, 30))
            new = rng.choice(["", rng.choice(FRAGMENTS), text[a:b] * 2, chr(rng.randrange(1, 0x2FF)), text[:b]])
            text = text[:a] + new + text[b if rng.random() < 0.8 else a :]
        found = read([text], form)
        assert read(in_pieces(text, rng), form) == found
        assert all(json.dumps(call.message()).encode() for call in found.calls)
        assert bool(found.calls or found.malformed) >= ("<tool_call>" in text)
        calls += len(found.calls)
    assert 1000 < calls < 15_000  # some of both


@pytest.mark.parametrize("form", ["xml", "json"])
@pytest.mark.parametrize("noise", ["<", ">", "</parameter>", "</parameter>\n", "\n", "{", '"', "\\", "<tool_call>"])
def test_long_calls_take_time_in_proportion(form: ToolForm, noise: str) -> None:
    """20,000 pieces; looking through all of the text for each of them would take minutes."""
    start = "<tool_call><function=write_file><parameter=path>" if form == "xml" else '<tool_call>{"name": "'
    read([start, *[noise] * 20_000], form)
