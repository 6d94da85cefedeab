"""Jinja's filters whose work is more than the size of what they are given: each pays for it before it begins.

Widths, precisions and counts multiply; regular expressions and repeated cuts can take the square of a word. See
`edgeq.text.sandbox` for what paying means.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

from jinja2 import filters, pass_eval_context
from jinja2.exceptions import SecurityError
from jinja2.nodes import EvalContext
from jinja2.runtime import Undefined
from jinja2.sandbox import SandboxedEnvironment, SandboxedFormatter

__all__ = ["Formatter", "Meter", "costly_filters", "pay_for_printf"]

_WIDEST = 1000  # characters of a width, a precision, an indentation
_MOST = 1 << 20  # parts that something is cut into
_PERCENT = re.compile(r"%(?:\([^)]*\))?[#0\- +]*(\*|\d+)?(?:\.(\*|\d+))?")
_NUMBER = re.compile(r"\d+")


class Meter(Protocol):
    """What pays: the sandbox."""

    def spend(self, amount: int) -> None: ...
    def pay(self, value: object) -> None: ...
    def cost(self, value: object) -> int: ...
    def text(self, value: object) -> str: ...


def costly_filters(meter: Meter, environment: SandboxedEnvironment) -> dict[str, Callable[..., Any]]:
    """The filters by name, as Jinja has them; of `tojson`, with transformers' arguments."""

    def attr(value: object, name: str) -> Any:
        meter.pay([value, name])
        return _allowed(filters.do_attr(environment, value, name))

    def batch(value: Iterable[Any], linecount: int, fill_with: Any = None) -> list[Any]:
        meter.spend(_within(linecount, _MOST))
        return list(filters.do_batch(_paid(value), linecount, fill_with))

    def slices(value: Iterable[Any], slices: int, fill_with: Any = None) -> list[Any]:
        meter.spend(50 * _within(slices, _MOST))
        return list(filters.sync_do_slice(_paid(value), slices, fill_with))

    def center(value: object, width: int = 80) -> str:
        text = meter.text(value)
        meter.spend(_within(width, _MOST))
        return filters.do_center(text, width)

    def indent(value: object, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
        text = meter.text(value)
        each = len(width) if isinstance(width, str) else _within(width, _WIDEST)
        meter.spend(each * (len(text.splitlines()) + 1))
        return filters.do_indent(text, width, first, blank)

    def printf(value: object, *args: Any, **kwargs: Any) -> str:
        text = meter.text(value)
        pay_for_printf(meter, text, kwargs or args)
        return filters.do_format(text, *args, **kwargs)

    def wordwrap(
        value: object, width: int = 79, break_long_words: bool = True, wrapstring: str | None = None,
        break_on_hyphens: bool = True,
    ) -> str:  # fmt: skip
        text, wrap = meter.text(value), environment.newline_sequence if wrapstring is None else meter.text(wrapstring)
        least = max(_within(width, 1 << 62), 1)
        lines = 2 * len(text) // least + len(text.splitlines()) + 1
        meter.spend(len(wrap) * lines + sum(len(word) ** 2 // least for word in text.split()))
        return filters.do_wordwrap(environment, text, width, break_long_words, wrap, break_on_hyphens)

    def striptags(value: object) -> str:
        text = meter.text(value)
        meter.spend(len(text) * text.count("<"))
        return filters.do_striptags(text)

    @pass_eval_context
    def urlize(context: EvalContext, value: object, *args: Any, **kwargs: Any) -> str:
        text = meter.text(value)
        meter.pay([args, kwargs])
        others = meter.cost([args, kwargs]) * len(text.split())
        meter.spend(others + sum(len(word) ** 2 for word in text.split()))
        return filters.do_urlize(context, text, *args, **kwargs)

    def rounded(value: float, precision: int = 0, method: Any = "common") -> float:
        meter.pay(value)
        _within(precision, 300)
        return filters.do_round(value, precision, method)

    def summed(iterable: Iterable[Any], attribute: str | int | None = None, start: Any = 0) -> Any:
        if isinstance(start, str):
            raise TypeError("sum() can't sum strings")
        items = _paid(iterable)
        if attribute is not None:
            items = list(map(filters.make_attrgetter(environment, attribute), items))
        for item in items:
            meter.pay(start)
            meter.pay(item)
            start = start + item
        return start

    def tojson(
        value: object, ensure_ascii: bool = False, indent: int | str | None = None,
        separators: tuple[str, str] | None = None, sort_keys: bool = False,
    ) -> str:  # fmt: skip
        each = 0 if indent is None else len(indent) if isinstance(indent, str) else _within(indent, _WIDEST)
        between = sum(len(meter.text(separator)) for separator in separators or ())
        meter.pay(value)
        values, depth = _extent(value)
        meter.spend(values * (each * depth + between))
        return json.dumps(
            value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )  # fmt: skip

    def pprint(value: object) -> str:
        meter.pay(value)
        values, depth = _extent(value)
        meter.spend(values * depth + depth * meter.cost(value))
        return filters.do_pprint(value)

    def _paid(value: Iterable[Any]) -> list[Any]:
        items = list(value)
        meter.pay(items)
        return items

    return {
        "attr": attr, "batch": batch, "center": center, "format": printf, "indent": indent, "pprint": pprint,
        "round": rounded, "slice": slices, "striptags": striptags, "sum": summed, "tojson": tojson, "urlize": urlize,
        "wordwrap": wordwrap,
    }  # fmt: skip


def pay_for_printf(meter: Meter, text: str, values: object) -> None:
    """Pay for `text % values`: every conversion may print all of them."""
    conversions = _PERCENT.findall(text)
    for width, precision in conversions:
        if "*" in (width, precision):
            raise SecurityError("a width that is a value is not available here")
        meter.spend(_within(int(width or 0), _WIDEST) + _within(int(precision or 0), _WIDEST))
    meter.pay(values)
    meter.spend(len(conversions) * meter.cost(values))


class Formatter(SandboxedFormatter):
    """`str.format`: a field pays for what it prints, and for its width."""

    def __init__(self, meter: Meter, environment: SandboxedEnvironment) -> None:
        super().__init__(environment)
        self._meter = meter

    def get_field(self, field_name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        value, first = super().get_field(field_name, args, kwargs)
        return _allowed(value), first

    def format_field(self, value: Any, format_spec: str) -> Any:
        self._meter.pay(value)
        for number in _NUMBER.findall(format_spec):
            self._meter.spend(_within(int(number[:9]), _WIDEST))
        return super().format_field(value, format_spec)

    def vformat(self, format_string: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
        return str(super().vformat(format_string, args, kwargs))


def _allowed(value: Any) -> Any:
    """A value that was looked up; SecurityError, here and not where it would be used, for what is no template's."""
    if isinstance(value, Undefined) and value._undefined_exception is SecurityError:
        raise SecurityError(value._undefined_message)
    return value


def _within(number: object, most: int) -> int:
    """The size of a whole number; SecurityError if it is none, or too large. Negative ones ask for little."""
    if not isinstance(number, int) or not -most <= number <= most:
        raise SecurityError(f"a number here must be whole and at most {most}")
    return abs(number)


def _extent(value: object) -> tuple[int, int]:
    """How many values are inside of one, and how deep they are nested."""
    count, deepest, stack = 0, 1, [(value, 1)]
    while stack:
        item, depth = stack.pop()
        count, deepest = count + 1, max(deepest, depth)
        children: Iterable[Any] = ()
        if isinstance(item, dict):
            children = item.values()
        elif isinstance(item, list | tuple):
            children = item
        stack += [(child, depth + 1) for child in children]
    return count, deepest
