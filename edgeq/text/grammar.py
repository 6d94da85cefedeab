"""Structured output: which tokens may come next, so that an answer fits a JSON schema, a regex or a grammar.

The work is that of `llguidance` (https://github.com/guidance-ai/llguidance), which is imported when it is first needed:
it walks the vocabulary as a tree of bytes and cuts off what no continuation of the grammar begins with.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from edgeq.errors import EdgeqError, UsageError
from edgeq.printable import brief, one_line, printable
from edgeq.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher

__all__ = ["Grammars", "Matcher", "Shape", "check_shape"]

Shape = tuple[Literal["schema", "regex", "grammar"], str]
"""What an answer is to fit, and its text: a JSON schema, a regex (of Rust's syntax), or a grammar in Lark or GBNF."""

_WHITE_SPACE = r"[ ]|\n[ \t]{0,32}"
"""Between the parts of JSON: a model that may write any amount of it can go on doing so."""

_WITHIN = ("$defs", "definitions", "properties", "patternProperties")
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems", "items")
_ONE = ("items", "additionalProperties", "additionalItems", "not", "if", "then", "else", "contains", "propertyNames")
_BOUNDS = ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum", "multipleOf")
_LARGEST = 1 << 63  # of the numbers that the library can count with
_MOST_COMPILED = 16  # grammars that are kept
_LONGEST = 200  # characters of one of the library's messages
_MOST_PARTS = 2000  # of a schema, looked through for the one that cannot be done


class Matcher:
    """A grammar on its way through an answer: a `Constraint` of `edgeq.generate`."""

    def __init__(self, matcher: LLMatcher, tokens: int) -> None:
        self._matcher, self._tokens = matcher, tokens
        self._bits = np.zeros((tokens + 31) // 32, np.uint32)

    def allowed(self) -> NDArray[np.bool_]:
        """Mask [tokens] of what may come next."""
        self._matcher.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)
        self._check()
        bits = np.unpackbits(self._bits.astype("<u4", copy=False).view(np.uint8), count=self._tokens, bitorder="little")
        return bits.view(np.bool_)

    def accept(self, token: int) -> None:
        """Go on behind `token`."""
        self._matcher.consume_token(token)
        self._check()

    @property
    def complete(self) -> bool:
        """Whether nothing but the end may follow."""
        return bool(self._matcher.is_stopped())

    def _check(self) -> None:
        if self._matcher.is_error():
            raise EdgeqError(
                f"the grammar cannot be followed any further: {_told(self._matcher.get_error())}",
                hint="simplify the schema, regex or grammar",
            )


class Grammars:
    """The grammars of a vocabulary, compiled once each.

    tokens: how many ids exist. eos_ids: those that end a text, which are allowed where the grammar is fulfilled.
    """

    def __init__(self, tokenizer: Tokenizer, *, tokens: int, eos_ids: Iterable[int]) -> None:
        library, eos = _library(), sorted(i for i in eos_ids if i < tokens)
        if not eos:
            raise UsageError(
                "structured output needs a token that ends a text, and this model has none",
                hint="use the tokenizer_config.json of the original checkpoint",
            )
        # "slices", tables for frequent masks, would take another 0.3 s and 60 MB; masks take 0.3 ms without them.
        wrapper = library.TokenizerWrapper(_Vocabulary(tokenizer, tokens, eos[0]))
        self._tokenizer = library.LLTokenizer(wrapper, n_vocab=tokens, eos_token=eos, slices=[])
        self._tokens, self._encode = tokens, tokenizer.encode
        self._compiled: dict[Shape, LLMatcher] = {}

    def matcher(self, shape: Shape, begun: str = "") -> Matcher:
        """A matcher in an answer that has `begun`; UsageError for a shape that cannot be done, naming the part, and a
        beginning that does not fit.
        """
        if shape not in self._compiled:
            matcher = _library().LLMatcher(self._tokenizer, _source(shape), log_level=0)
            first = matcher.deep_copy()
            first.compute_bitmask()  # which finds out whether anything fits at all
            if first.is_error():
                raise _refused(shape, first.get_error())
            if len(self._compiled) == _MOST_COMPILED:
                del self._compiled[next(iter(self._compiled))]
            self._compiled[shape] = matcher
        matcher, ids = self._compiled[shape].deep_copy(), self._encode(begun)
        if matcher.try_consume_tokens(ids) < len(ids):
            raise UsageError(f"the answer begins with {brief(begun)}, which does not fit the {shape[0]}")
        return Matcher(matcher, self._tokens)


def check_shape(shape: Shape) -> None:
    """UsageError for a shape that cannot be done, naming the part. Needs no model."""
    if message := _fault(_source(shape)):
        raise _refused(shape, message)


class _Vocabulary:
    """A tokenizer as the library wants it."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, tokens: int, eos: int) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id = eos
        self.tokens = [tokenizer.token_bytes(i) for i in range(tokens)]
        self.special_token_ids = sorted(i for i in tokenizer.control_ids if i < tokens)
        self._of_byte = {token[0]: i for i, token in enumerate(self.tokens) if len(token) == 1}

    def __call__(self, text: str | bytes) -> list[int]:
        """Ids that stand for exactly `text`; those of its bytes where the tokenizer's own are another text's (NFC)."""
        spelled = text if isinstance(text, bytes) else text.encode()
        ids = self._tokenizer.encode(spelled.decode())
        if b"".join(map(self._tokenizer.token_bytes, ids)) == spelled:
            return ids
        return [self._of_byte[byte] for byte in spelled] if spelled.isascii() or len(self._of_byte) == 256 else ids


def _library() -> Any:
    """llguidance; UsageError that says how to get it where it is not installed."""
    try:
        import llguidance
    except ImportError:
        raise UsageError(
            "structured output (schema, regex, grammar) needs the package llguidance",
            hint="install it: pip install 'edgeq[grammar]'",
        ) from None
    return llguidance


def _source(shape: Shape) -> str:
    """A shape in the library's own notation; UsageError for what that does not take, or gets wrong."""
    kind, text = shape
    library = _library()
    if kind == "schema":
        for place, part in _all_parts(json.loads(text)):
            if message := _unsafe(part):
                raise _not_done(_called(shape), message, place)
    try:
        if kind == "schema":
            return _schema_source(json.loads(text))
        if kind == "regex":
            return str(library.LLMatcher.grammar_from_regex(text))
        from llguidance.gbnf_to_lark import any_to_lark

        return str(library.LLMatcher.grammar_from_lark(any_to_lark(text)))
    except Exception as error:  # half of a character, too many levels, and whatever the converter of GBNF has to say
        raise _not_done(_called(shape), one_line(error)) from None


def _schema_source(schema: object) -> str:
    if isinstance(schema, bool):
        schema = {} if schema else {"enum": []}
    options = {"whitespace_pattern": _WHITE_SPACE, "whitespace_flexible": True}
    return str(_library().LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=options))


def _fault(source: str) -> str:
    """What the library has against a grammar; "" for nothing."""
    wrong, messages = _library().LLMatcher.validate_grammar_with_warnings(source)
    return str(messages[0]) if wrong else ""


def _unsafe(part: Any) -> str:
    """What the library would get wrong in a part of a schema without saying so; "" for nothing."""
    if not isinstance(part, Mapping):
        return ""
    bounds = {key: value for key in _BOUNDS if isinstance(value := part.get(key), int | float)}
    listed = part.get("enum")
    for value in (part.get("const"), *(listed if isinstance(listed, list) else ()), *bounds.values()):
        if isinstance(value, int | float) and abs(value) >= _LARGEST:
            return f"the number {brief(value)} is beyond 2^63"
    low, high = bounds.get("exclusiveMinimum"), bounds.get("exclusiveMaximum")
    least, most = bounds.get("minimum", low), bounds.get("maximum", high)
    narrow = least is not None and most is not None and most - least < 1
    if narrow and any(bound is not None and bound == int(bound) for bound in (low, high)):
        return "an exclusive bound at a whole number needs the other one at least 1 away"
    return ""


def _refused(shape: Shape, message: str) -> UsageError:
    """For a shape that the library does not take."""
    place = _culprit(json.loads(shape[1]), message) if shape[0] == "schema" else ""
    return _not_done(_called(shape), _told(message), place)


def _called(shape: Shape) -> str:
    kind, text = shape
    return {"schema": "the JSON schema", "regex": f"the regex {brief(text)}", "grammar": "the grammar"}[kind]


def _not_done(what: str, why: str, place: str = "") -> UsageError:
    return UsageError(
        f"{what} cannot be followed: {why}" + (f" (at {place})" if place else ""),
        hint="docs/guides/structured-output.md lists what can be done",
    )


def _told(message: str) -> str:
    """What one of the library's messages comes to, without the lines that draw it."""
    found = message.partition("\nerror: ")[2] or message
    first = found.partition("\n")[0].strip()
    return (
        "nothing fits it" if first.startswith("NoExtension") else printable(first, longest=_LONGEST) or "unknown reason"
    )


def _culprit(schema: Any, message: str) -> str:
    """The innermost part of a schema that by itself gets the same message, as a JSON pointer (#/properties/a)."""
    path, part, left = "#", schema, _MOST_PARTS
    root = {key: schema[key] for key in ("$defs", "definitions") if isinstance(schema, Mapping) and key in schema}
    while True:
        for step, inner in _parts(part):
            left -= 1
            whole = {**root, **inner} if isinstance(inner, Mapping) else inner
            if left >= 0 and _told(_fault(_schema_source(whole))) == _told(message):
                path, part = f"{path}/{step}", inner
                break
        else:
            return path


def _all_parts(schema: Any) -> Iterator[tuple[str, Any]]:
    """Every schema within a schema, itself included, and where."""
    waiting = [("#", schema)]
    while waiting:
        path, part = waiting.pop()
        yield path, part
        waiting += [(f"{path}/{step}", inner) for step, inner in _parts(part)]


def _parts(schema: Any) -> Iterator[tuple[str, Any]]:
    """The schemas right within a schema, and where."""
    if not isinstance(schema, Mapping):
        return
    for key in _WITHIN:
        if isinstance(table := schema.get(key), Mapping):
            yield from ((f"{key}/{_escaped(name)}", inner) for name, inner in table.items())
    for key in _LISTS:
        if isinstance(options := schema.get(key), Sequence) and not isinstance(options, str):
            yield from ((f"{key}/{n}", inner) for n, inner in enumerate(options))
    for key in _ONE:
        if isinstance(inner := schema.get(key), Mapping | bool):
            yield key, inner


def _escaped(name: object) -> str:
    """A name within a JSON pointer (RFC 6901)."""
    return str(name).replace("~", "~0").replace("/", "~1")
