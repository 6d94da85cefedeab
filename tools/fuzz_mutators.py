"""Changes to files that a parser may not have been written for: bytes, structure of JSON, pieces of templates, cuts."""

from __future__ import annotations

import copy
import json
import struct
from collections.abc import Callable
from random import Random
from typing import Any

__all__ = ["Mutator", "cut", "mutate_bytes", "mutate_json", "mutate_template"]

Mutator = Callable[[Random, bytes], bytes]

_NUMBERS = (0, 1, 2, 7, 8, 31, 32, 127, 128, 255, 256, 1 << 15, 1 << 16, 1 << 20, 1 << 31, 1 << 32, 1 << 48, 1 << 63)
_TEXTS = (
    b"9" * 20, b"9" * 400, b"-1", b"1e999", b"NaN", b"-Infinity", b"null", b"true", b"[]", b"{}", b"[[[[[[[[",
    b'""', b'"', b"\\", b"\x00", b"\xff", b"\xed\xa0\x80", b"\x1b[2J", b"\n", b"../", b"/", b"}", b"{", b",",
    b":", b"0", b" ", b"\\ud800",
)  # fmt: skip
_VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 4.0, 0.5, -0.0, 1e308, float("nan"), float("inf"), float("-inf"), 10**18,
    1 << 63, 10**400, -(10**400), "", "x", "9" * 400, "\ud800", "\x1b[2J\n", "../x", "NFC", "ByteLevel",
    "Split", "a" * 5000, [], {}, [[]], [None], [0, 1, 2], {"": None}, {"type": "Sequence"},
    {"a": {"b": {"c": []}}}, [1] * 1000,
)  # fmt: skip


def mutate_bytes(rng: Random, data: bytes) -> bytes:
    """One to six changes of bytes, mostly one."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 6))):
        _change(rng, changed)
    return bytes(changed)


def _change(rng: Random, data: bytearray) -> None:
    at = rng.randint(0, len(data))
    match rng.randrange(8):
        case 0:
            data[at : at + 1] = bytes([rng.randrange(256)])
        case 1 if at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        case 2:
            del data[at : at + rng.choice((1, 2, 4, 8, 64))]
        case 3:
            data[at:at] = rng.choice(_TEXTS)
        case 4:
            data[at : at + rng.choice((1, 4, 8))] = rng.choice(_TEXTS)
        case 5:
            number = rng.choice(_NUMBERS) - rng.randrange(2)
            data[at : at + 8] = struct.pack("<q", max(min(number, (1 << 63) - 1), -1))[: rng.choice((4, 8))]
        case 6:
            piece = data[at : at + rng.choice((4, 16, 256))]
            into = rng.randint(0, len(data))
            data[into:into] = piece
        case _:
            if rng.random() < 0.2:
                del data[at:]


def mutate_json(rng: Random, data: bytes) -> bytes:
    """One to three changes of a JSON text's values, keys and order; now and then bytes on top."""
    value = copy.deepcopy(json.loads(data))
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        value = _changed(rng, value)
    text = json.dumps(value).encode()
    return mutate_bytes(rng, text) if rng.random() < 0.2 else text


def _changed(rng: Random, value: Any) -> Any:
    """`value` with something in it changed, at a depth that chance decides."""
    inside = isinstance(value, dict | list) and value and rng.random() < 0.85
    if not inside:
        return copy.deepcopy(rng.choice(_VALUES)) if rng.random() < 0.8 else [value] * rng.choice((0, 2, 50))
    key = rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
    match rng.randrange(8):
        case 0:
            del value[key]
        case 1 if isinstance(value, dict):
            value[rng.choice((*value, "", "type", "x\x1b", "\ud800"))] = value.pop(key)
        case 2 if isinstance(value, list):
            value.insert(key, value[rng.randrange(len(value))])
        case 3 if isinstance(value, dict):
            value[key] = value[rng.choice(list(value))]
        case _:
            value[key] = _changed(rng, value[key])
    return value


_SNIPPETS = (
    "{{ ", " }}", "{% ", " %}", "{%- ", " -%}", "{# ", " #}", "{% for x in messages %}", "{% endfor %}",
    "{% if ", "{% else %}", "{% endif %}", "{% set a = ", "namespace(", "messages", "[0]", ".content", "|trim",
    "|tojson", "|replace('a', 'b' * 99)", "range(99999)", "* 9999", "** 9", "~", "+", "(", ")", "[", "]", "'",
    '"', "{% macro f(x) %}", "{% endmacro %}", "{{ f(f) }}", "loop", "recursive", "raise_exception('x')",
    "strftime_now('%Y')", "{% raw %}", "{% endraw %}", ".__class__", "|attr('x')", "is defined", "in", "not ",
    "{% break %}", "{% block a %}{% endblock %}", "self.a()", "1.5", "99999999999", "|join(',')", "\n", "\x00",
    "\udfff", "{% include 'x' %}", "{% call f(1) %}{% endcall %}", "{% filter upper %}{% endfilter %}",
    "dict(a=1)", "|map('x')", "{% generation %}", "{% endgeneration %}", "|batch(", "|slice(9", "|center(99",
    "|indent('x'",
    "|format(1)", "'%9s'", "|groupby('role')", "|pprint", "|round(9", "|sum(start=[])", "|striptags", "|urlize",
    "|wordwrap(1)", "|truncate(9)", "|xmlattr", "|urlencode", "|filesizeformat", ".format(messages)", "'{0[0]:>9}'",
    ".ljust(99", ".expandtabs(", ".fromkeys(", ".copy()", "cycler(1, 2)", ".next()", "joiner(',')()", "%", "- 1",
)  # fmt: skip


def mutate_template(rng: Random, data: bytes) -> bytes:
    """Pieces of a template's syntax put in, taken out and moved."""
    text = data.decode()
    for _ in range(rng.choice((1, 1, 1, 2, 3, 5))):
        at, end = sorted((rng.randint(0, len(text)), rng.randint(0, len(text))))
        match rng.randrange(4):
            case 0:
                text = text[:at] + text[min(end, at + 40) :]
            case 1:
                text = text[:at] + text[at : at + 60] * rng.choice((2, 3, 20)) + text[at:]
            case _:
                text = text[:at] + rng.choice(_SNIPPETS) + text[at:]
    return text.encode(errors="surrogatepass")


def cut(data: bytes, number: int, of: int) -> bytes:
    """The `number`-th of `of` truncations, evenly spread over the file."""
    return data[: len(data) * number // of]
