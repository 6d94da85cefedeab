r"""Tool calls, told apart from the answer as its text arrives.

The family writes a call as its chat template does, which is known as the Qwen3-Coder form:

    <tool_call>\n<function=NAME>\n<parameter=KEY>\nVALUE\n</parameter>\n</function>\n</tool_call>

Templates of earlier families have JSON between the same tags: {"name": NAME, "arguments": {KEY: VALUE}}. A call is held
back until it is complete. What turns out to be none is text like any other, and the reason is kept beside it; whatever
the text, nothing is raised. The result does not depend on how the text was cut into pieces.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from edgeq.errors import ModelError
from edgeq.printable import brief

if TYPE_CHECKING:
    from edgeq.text.template import ChatTemplate, Message

__all__ = ["MalformedCall", "Segment", "ToolCall", "ToolCallParser", "ToolForm", "tool_form"]

ToolForm = Literal["xml", "json"]

_OPEN, _CLOSE, _FUNCTION = "<tool_call>", "</tool_call>", "<function="
_LONGEST_NAME = 256  # characters of a function's or parameter's name
_DEEPEST = 32  # levels of an argument, half of what a message may have
_MOST_HOPS = 16  # references within a schema that are followed


class ToolCall(NamedTuple):
    """A call that the model asks for. `id` is unique within the conversation."""

    id: str
    name: str
    arguments: dict[str, Any]

    def message(self) -> dict[str, Any]:
        """The call as OpenAI's interface writes it within a message: `arguments` is JSON text there."""
        arguments = json.dumps(self.arguments, ensure_ascii=False)
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": arguments}}


class MalformedCall(NamedTuple):
    """What began like a call and was none: its text up to where that was certain, and why."""

    text: str
    reason: str


class Segment(NamedTuple):
    """A stretch of text: of the answer, or a whole call with the white space around it."""

    channel: Literal["answer", "tool_call"]
    text: str


def tool_form(template: ChatTemplate) -> ToolForm:
    """How a chat template wants calls to be written; the family's own way if it does not say."""
    tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
    call = {"type": "function", "function": {"name": "look", "arguments": {"key": "value"}}}
    question: Message = {"role": "user", "content": "?"}
    written = ""
    for messages in ([question, {"role": "assistant", "content": "", "tool_calls": [call]}], [question]):
        try:
            written += template.render(messages, add_generation_prompt=False, tools=[tool])
        except ModelError:
            continue
    return "json" if _OPEN in written and "<function=" not in written else "xml"


class ToolCallParser:
    """Passes an answer through, taking the calls out of it.

    tools: descriptions of what was offered. A call of anything else is malformed, and the arguments of the XML form
    have the types of their parameters (JSON Schema). A parameter of no known type is an object or a list where it reads
    as one, and else text. prefix: what the ids of the calls begin with.
    """

    def __init__(self, form: ToolForm, tools: Iterable[Mapping[str, Any]] = (), prefix: str = "call") -> None:
        self.calls: list[ToolCall] = []
        self.malformed: list[MalformedCall] = []
        self._form: ToolForm = form
        self._parameters = dict(_described(tools))
        self._prefix = prefix
        self._held = ""  # not yet decided: the white space and the part of a tag at the end of the answer so far
        self._block: _Block | None = None  # the call that is being read
        self._answered = False  # there was more to the answer than white space
        self._after_call = False  # and nothing but white space since a call

    @property
    def in_call(self) -> bool:
        """Whether what came last may be part of a call."""
        return self._block is not None

    def push(self, text: str) -> list[Segment]:
        """Take the next text of the answer; what is decided by now."""
        found: list[Segment] = []
        while text:
            text = self._in_block(text, found) if self._block else self._in_answer(text, found)
        return found

    def flush(self) -> list[Segment]:
        """The answer is over: what was held back. A call that was not finished is malformed."""
        found: list[Segment] = []
        if self._block is not None:
            self._give_up(self._block, len(self._block.text), "the reply ended within the call", found)
        self._say(self._held, found)
        self._held = ""
        return found

    def _in_answer(self, text: str, found: list[Segment]) -> str:
        """Pass text on up to what begins a call; what is left is the text behind that."""
        text = self._held + text
        tags = (_OPEN, _FUNCTION) if self._form == "xml" else (_OPEN,)
        start, tag = min(((at, tag) for tag in tags if (at := text.find(tag)) >= 0), default=(len(text), ""))
        end = start if tag else start - max(_begun(text, tag) for tag in tags)
        shown = len(text[:end].rstrip())
        if shown:
            self._say(text[:shown], found)
        self._held = text[shown:start]
        if tag == _FUNCTION:
            self.malformed.append(MalformedCall(tag, f"a function stands outside of {_OPEN}"))
            self._say(self._held + tag, found)
            self._held = ""
        elif tag:
            self._block = _Block(self._form, self._parameters)
        return text[start + len(tag) :]

    def _in_block(self, text: str, found: list[Segment]) -> str:
        """Go on reading the call; what is left is the text behind it."""
        block = self._block
        assert block is not None
        block.text += text
        try:
            next(block.steps)
            return ""
        except _Wrong as wrong:
            return self._give_up(block, block.read, wrong.reason, found)
        except StopIteration as done:
            name, arguments = done.value
        self.calls.append(ToolCall(f"{self._prefix}_{len(self.calls) + 1}", name, arguments))
        found.append(Segment("tool_call", self._held + block.text[: block.read]))
        self._held, self._block, self._after_call = "", None, True
        return block.text[block.read :]

    def _give_up(self, block: _Block, end: int, reason: str, found: list[Segment]) -> str:
        """What was read of a call up to `end` is answer after all; what is left is the text behind it."""
        self.malformed.append(MalformedCall(block.text[:end], reason))
        self._say(self._held + block.text[:end], found)
        self._held, self._block = "", None
        return block.text[end:]

    def _say(self, text: str, found: list[Segment]) -> None:
        """A stretch of the answer. White space after a call counts to the call, unless it stands between two stretches
        of answer.
        """
        kept = text if (self._answered and text.strip()) or not self._after_call else text.lstrip()
        if dropped := text[: len(text) - len(kept)]:
            found.append(Segment("tool_call", dropped))
        if kept:
            found.append(Segment("answer", kept))
            self._answered = self._answered or bool(kept.strip())
            self._after_call = False


def _begun(text: str, tag: str) -> int:
    """Length of the longest end of `text` that begins `tag`."""
    return next((n for n in range(len(tag) - 1, 0, -1) if text.endswith(tag[:n])), 0)


class _Wrong(Exception):
    """Not a call."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)


Call = tuple[str, dict[str, Any]]
Steps = Generator[None, None, Any]

_IN_VALUE = re.compile(r"</parameter>|<parameter=[^<>\n]{1,256}>|<tool_call>")
_IN_JSON = re.compile(r'["{}\[\]]|</tool_call>')
_IN_STRING = re.compile(r'\\.|["\n]', re.DOTALL)
_SPACE = re.compile(r"\s*")


class _Block:
    """Reads one call, from its `<tool_call>` on, out of a `text` that grows.

    `steps` is advanced whenever there is more text; it ends with the function's name and arguments, or raises _Wrong.
    `read` is then where the call, or what was taken for one, is over. Every character is looked at a few times only.
    """

    def __init__(self, form: ToolForm, parameters: Mapping[str, Any]) -> None:
        self.text = _OPEN
        self.read = len(_OPEN)
        self._parameters = parameters
        self.steps: Generator[None, None, Call] = self._xml() if form == "xml" else self._json()

    def _xml(self) -> Generator[None, None, Call]:
        yield from self._tag(_FUNCTION)
        name = yield from self._name("function")
        schema = self._parameters.get(name)
        arguments: dict[str, Any] = {}
        while (yield from self._tag("<parameter=", "</function>")) == "<parameter=":
            key = yield from self._name("parameter")
            value = yield from self._value(key, _properties(schema).keys() - arguments.keys() - {key})
            if key in arguments:
                raise _Wrong(f"the parameter {brief(key)} is given twice")
            arguments[key] = value
        yield from self._tag(_CLOSE)
        self._check_name(name)
        for key, value in arguments.items():
            try:
                arguments[key] = _typed(value, _properties(schema).get(key), schema)
            except _Wrong as wrong:
                raise _Wrong(f"the parameter {brief(key)} is {brief(value)}, expected {wrong.reason}") from None
        return name, arguments

    def _json(self) -> Generator[None, None, Call]:
        yield from self._tag("{")
        start = self.read - 1
        yield from self._json_end()
        call = _parsed(self.text[start : self.read])
        yield from self._tag(_CLOSE)
        if not isinstance(call, dict):
            raise _Wrong("what is between the tags is not JSON")
        name, arguments = call.get("name"), call.get("arguments", {})
        if isinstance(arguments, str):  # some write the arguments as text, as OpenAI's interface does
            arguments = _parsed(arguments)
        if not isinstance(name, str) or not isinstance(arguments, dict):
            raise _Wrong('the JSON needs a "name", which is text, and "arguments", which are an object')
        self._check_name(name)
        return name, arguments

    def _check_name(self, name: str) -> None:
        if self._parameters and name not in self._parameters:
            raise _Wrong(f"the function {brief(name)} was not offered")

    def _skip(self) -> Steps:
        """Go behind white space, which ends where something else begins."""
        while True:
            found = _SPACE.match(self.text, self.read)
            self.read = found.end() if found else self.read
            if self.read < len(self.text):
                return
            yield

    def _follows(self, *tags: str) -> Generator[None, None, str]:
        """Which of `tags` comes next; "" for something else."""
        while True:
            rest = self.text[self.read : self.read + max(map(len, tags))]
            for tag in tags:
                if rest.startswith(tag):
                    return tag
            if not any(tag.startswith(rest) for tag in tags):
                return ""
            yield

    def _tag(self, *tags: str) -> Generator[None, None, str]:
        """Read one of `tags`, after white space."""
        yield from self._skip()
        tag = yield from self._follows(*tags)
        if not tag:
            raise _Wrong(f"{brief(self.text[self.read])} stands where {' or '.join(tags)} should begin")
        self.read += len(tag)
        return tag

    def _name(self, what: str) -> Generator[None, None, str]:
        """Read a name and the `>` behind it."""
        start = self.read
        while True:
            while self.read < len(self.text):
                char = self.text[self.read]
                if char in "<\n" or self.read - start > _LONGEST_NAME:
                    raise _Wrong(f"the name of a {what} is not closed")
                self.read += 1
                if char == ">":
                    name = self.text[start : self.read - 1].strip().strip("\"'")
                    if not name:
                        raise _Wrong(f"a {what} without a name")
                    return name
            yield

    def _value(self, key: str, others: Iterable[str]) -> Generator[None, None, str]:
        """Read a parameter's value and the `</parameter>` behind it: one that another parameter, or the function's end,
        follows, so that the tag may also be part of a value. But a parameter or a whole new call on a line of its own
        may not, nor one of the function's `others` anywhere: then this one was not closed.
        """
        start = scan = self.read
        while True:
            found = _IN_VALUE.search(self.text, scan)
            if found is None:
                tag = self.text.rfind("<", scan)  # which may not be complete
                scan = tag if tag >= 0 else len(self.text)
                yield
                continue
            scan, end, unclosed = found.start(), found.end(), False
            if found[0] == "</parameter>":
                self.read = end
                yield from self._skip()
                if (yield from self._follows("<parameter=", "</function>")):
                    return self.text[start:scan].removeprefix("\n").removesuffix("\n")
            elif found[0] == _OPEN:
                self.read = end
                yield from self._skip()
                unclosed = self.text[scan - 1] == "\n" and bool((yield from self._follows(_FUNCTION)))
            else:
                unclosed = found[0][len("<parameter=") : -1] in others
                if not unclosed and self.text[scan - 1] == "\n":
                    self.read = end
                    unclosed = bool((yield from self._follows("\n")))
            if unclosed:
                self.read = scan
                raise _Wrong(f"the parameter {brief(key)} is not closed")
            scan = end

    def _json_end(self) -> Steps:
        """Go behind the object whose `{` was read."""
        depth, in_string = 1, False
        while depth:
            found = (_IN_STRING if in_string else _IN_JSON).search(self.text, self.read)
            if found is None:
                behind = self.text[self.read :]
                undecided = behind.endswith("\\") if in_string else _begun(behind, _CLOSE)
                self.read = len(self.text) - undecided
                yield
                continue
            self.read = found.end()
            match found[0]:
                case '"':
                    in_string = not in_string
                case "{" | "[":
                    depth += 1
                case "}" | "]":
                    depth -= 1
                case "\n":
                    raise _Wrong("a text in the JSON is not closed")
                case "</tool_call>":
                    raise _Wrong("an object in the JSON is not closed")


# --- what a parameter's text means ---------------------------------------------------------------------------------


def _described(tools: Iterable[Mapping[str, Any]]) -> Iterable[tuple[str, Any]]:
    """Names and parameters (JSON Schema, or whatever stands there) of the functions offered."""
    for tool in tools:
        function = tool.get("function", tool)
        name = function.get("name") if isinstance(function, Mapping) else None
        if isinstance(name, str):
            yield name, function.get("parameters")


def _properties(schema: object) -> Mapping[str, Any]:
    properties = schema.get("properties") if isinstance(schema, Mapping) else None
    return properties if isinstance(properties, Mapping) else {}


def _typed(text: str, schema: object, root: object) -> Any:
    """What `text` is as a value of `schema`; _Wrong, which says what is expected, if it is none."""
    types = _types(schema, root, _MOST_HOPS)
    if types is None:
        value = _parsed(text) if text.lstrip()[:1] in ("{", "[") else None
        return text if value is None else value
    for name, read in _READERS.items():
        if name in types:
            try:
                return read(text)
            except (ValueError, RecursionError):
                continue
    raise _Wrong(" or ".join(sorted(types)))


def _types(schema: object, root: object, hops: int) -> set[str] | None:
    """The types that a schema allows; None if it does not say."""
    if not isinstance(schema, Mapping) or hops < 0:
        return None
    if isinstance(reference := schema.get("$ref"), str):
        return _types(_referred(reference, root), root, hops - 1)
    if "type" in schema:
        named = schema["type"]
        each = [named] if isinstance(named, str) else named if _many(named) else []
        return {name for name in each if isinstance(name, str) and name in _READERS} or None
    if "const" in schema:
        return {_type_of(schema["const"])}
    if _many(schema.get("enum")):
        return {_type_of(value) for value in schema["enum"]} or None
    for key in ("anyOf", "oneOf"):
        if _many(schema.get(key)):
            options = [_types(option, root, hops - 1) for option in schema[key]]
            return None if None in options else {name for types in options if types for name in types} or None
    if _many(schema.get("allOf")):
        return next((types for option in schema["allOf"] if (types := _types(option, root, hops - 1))), None)
    return None


def _many(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _referred(reference: str, root: object) -> object:
    """What `#/$defs/NAME` stands for within `root`."""
    for step in reference.removeprefix("#/").split("/"):
        root = root.get(step.replace("~1", "/").replace("~0", "~")) if isinstance(root, Mapping) else None
    return root


def _type_of(value: object) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "boolean"
        case int():
            return "integer"
        case float():
            return "number"
        case str():
            return "string"
        case Mapping():
            return "object"
        case _:
            return "array"


def _null(text: str) -> None:
    if text.strip().lower() not in ("null", "none"):  # the latter is how the template writes it
        raise ValueError


def _boolean(text: str) -> bool:
    found = {"true": True, "false": False}.get(text.strip().lower())
    if found is None:
        raise ValueError
    return found


def _number(text: str) -> int | float:
    if not re.fullmatch(r"\s*[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?\s*", text, re.ASCII):
        raise ValueError
    if re.fullmatch(r"\s*[-+]?\d+\s*", text):
        return int(text)
    value = float(text)
    if not math.isfinite(value):
        raise ValueError
    return value


def _integer(text: str) -> int:
    value = _number(text)
    if value != int(value):
        raise ValueError
    return int(value)


def _json_of(kind: type) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        value = _parsed(text)
        if not isinstance(value, kind):
            raise ValueError
        return value

    return read


# In the order in which they are tried where a schema allows several: text is what everything is.
_READERS: Mapping[str, Callable[[str], Any]] = {
    "null": _null,
    "boolean": _boolean,
    "integer": _integer,
    "number": _number,
    "object": _json_of(dict),
    "array": _json_of(list),
    "string": str,
}


def _parsed(text: str) -> Any:
    """A JSON value, of texts that can be encoded, finite numbers and few levels; None if it is none."""
    try:
        return _plain(json.loads(text), _DEEPEST)
    except (ValueError, RecursionError):
        return None


def _plain(value: Any, levels: int) -> Any:
    if levels < 0 or (isinstance(value, float) and not math.isfinite(value)):
        raise ValueError
    if isinstance(value, str):  # an escape can spell half of a character
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, dict):
        return {_plain(key, levels): _plain(item, levels - 1) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item, levels - 1) for item in value]
    return value
