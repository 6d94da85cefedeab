"""Jinja for templates from strangers: no way out, and an end to everything.

Jinja's own sandbox keeps a template away from Python's internals, but not from a loop in a loop or from doubling a
string forty times. So a render here has a tank of fuel. The syntax tree is rewritten before it is compiled: whatever
loops, calls, joins, compares or builds a value first pays for its size, and an empty tank is an error. Fuel is
counted, not timed, so a template that renders does so on every machine. What costs more than the size of its operands
(padding, formatting with widths, powers, some filters) pays for that before it begins, or is refused.

Otherwise the environment is that of transformers' `apply_chat_template`: its options, its globals, its `tojson`, its
tag `{% generation %}`, and Jinja's own filters, tests and methods.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from functools import wraps
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.filters import make_attrgetter
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext, Macro, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment, safe_range
from jinja2.utils import Cycler, Joiner, Namespace
from jinja2.visitor import NodeTransformer

from edgeq.text.sandbox_filters import Formatter, costly_filters, pay_for_printf

__all__ = ["MAX_OUTPUT", "MAX_SOURCE", "Sandbox"]

FUEL = 1 << 26  # characters handled, syntax nodes run: a second or two at worst, ten thousand times a usual turn
_OPERATION = 50  # what any operation costs, in characters
MAX_SOURCE = 1 << 18  # characters of a template; the family's have 8,000
MAX_TOKENS = 1 << 14  # of the template's syntax, each of which costs some 2 kB to compile; the family's have 1,700
MAX_OUTPUT = 1 << 24  # characters of a rendering; a full context is some 10^6
_MAX_INT_BITS, _MAX_POWER_BITS = 1024, 256
_MAX_DATE = 256  # characters of a date's format, each of which can make 256 of the date
_OF_JINJA = ("_loop_vars", "_block_vars")  # what compiled templates add to the arguments of calls in loops and blocks


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Filters that look at the elements of a value, paid by its length, and those that look at all of it.
_SHALLOW_FILTERS = _names(
    "abs count d default first float int items last length list map random reject rejectattr reverse safe select "
    "selectattr"
)
_DEEP_FILTERS = _names(
    "capitalize dictsort e escape filesizeformat forceescape groupby lower max min sort string title trim truncate "
    "unique upper urlencode wordcount xmlattr"
)
_FREE_TESTS = _names(
    "boolean callable defined escaped false filter float integer iterable mapping none number sequence string test "
    "true undefined"
)
_DEEP_TESTS = _names("!= < <= == > >= divisibleby eq equalto ge greaterthan gt in le lessthan lower lt ne sameas upper")

_METHODS: dict[type[Any], frozenset[str]] = {
    str: _names(
        "capitalize casefold center count endswith expandtabs find format index isalnum isalpha isascii isdecimal "
        "isdigit isidentifier islower isnumeric isprintable isspace istitle isupper join ljust lower lstrip partition "
        "removeprefix removesuffix replace rfind rindex rjust rpartition rsplit rstrip split splitlines startswith "
        "strip swapcase title upper zfill"
    ),
    dict: _names("copy fromkeys get items keys values"),
    list: _names("copy count index"),
    tuple: _names("count index"),
    range: _names("count index start step stop"),
    int: _names("bit_length is_integer"),
    float: _names("is_integer"),
    Cycler: _names("current next reset"),
}
_PADDING = _names("center expandtabs ljust rjust zfill")


class Sandbox(ImmutableSandboxedEnvironment):
    """The Jinja environment of chat templates, as transformers sets it up, with a bound on a render's work."""

    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,  # or constant expressions would run, unmetered, while compiling
            finalize=_finalize,
            extensions=[_Generation, "jinja2.ext.loopcontrols"],
        )
        self._fuel = 0
        self._step = 1
        filters: dict[str, Any] = self.filters
        tests: dict[str, Any] = self.tests
        self.filters = {name: self._metered(filters[name], self.pay_length) for name in _SHALLOW_FILTERS}
        self.filters |= {name: self._metered(filters[name], self.pay) for name in _DEEP_FILTERS}
        self.filters |= {"join": self._join, "replace": self._replace, **costly_filters(self, self)}
        self.filters |= {name: getattr(self, f"_{name.strip()}") for name in _INTERNAL_FILTERS}
        self.tests = {name: tests[name] for name in _FREE_TESTS}
        self.tests |= {name: self._metered(tests[name], self.pay) for name in _DEEP_TESTS}
        self.tests |= {"even": lambda n: int(n) % 2 == 0, "odd": lambda n: int(n) % 2 == 1}
        self.globals = {
            "cycler": Cycler,
            "dict": _Dict(),
            "joiner": Joiner,
            "namespace": _OpaqueNamespace,
            "raise_exception": _raise_exception,
            "range": safe_range,
            "strftime_now": _strftime_now,
        }

    def compile_template(self, source: str) -> jinja2.Template:
        """Parse and compile `source`; raises whatever Jinja and Python raise for it."""
        if len(source) > MAX_SOURCE:
            raise SecurityError(f"it has {len(source)} characters, expected at most {MAX_SOURCE}")
        if any(count >= MAX_TOKENS for count, _ in enumerate(self.lexer.tokeniter(source, None))):
            raise SecurityError(f"it has more than {MAX_TOKENS:,} tokens")
        tree = self.parse(source)
        self._step = _OPERATION + sum(1 for _ in tree.find_all(nodes.Node))  # no iteration or call runs more than all
        return jinja2.Template.from_code(self, self.compile(_Metering().visit(tree)), self.make_globals(None))

    def refuel(self) -> None:
        """Fill the tank; to be called before each render."""
        self._fuel = FUEL

    # Paying

    def spend(self, amount: int) -> None:
        """Use up fuel; SecurityError when there is not enough."""
        self._fuel -= amount
        if self._fuel < 0:
            raise SecurityError("it does not come to an end, or builds values that are too large")

    def pay(self, value: object) -> None:
        """Pay for everything inside `value`, which also bounds the cost of comparing, hashing or printing it."""
        stack = [value]
        while stack:
            item = stack.pop()
            self.pay_length(item)
            if isinstance(item, dict):
                stack += item.keys()
                stack += item.values()
            elif isinstance(item, list | tuple):
                stack += item

    def cost(self, value: object) -> int:
        """What `pay` takes for `value`, which it does."""
        before = self._fuel
        self.pay(value)
        return before - self._fuel

    def pay_length(self, value: object) -> None:
        """Pay for the characters or elements of `value` itself."""
        if isinstance(value, int) and value.bit_length() > _MAX_INT_BITS:
            raise SecurityError("it computes with absurdly large numbers")
        self.spend(_OPERATION + (len(value) if isinstance(value, str | list | tuple | dict | range) else 0))

    def text(self, value: object) -> str:
        """`value` as the template prints it, paid for."""
        self.pay(value)
        return str(value)

    # What compiled templates call

    def concat(self, parts: Iterable[str]) -> str:
        return "".join(map(self._paid, parts))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        self.pay(left)
        self.pay(right)
        if operator == "%" and isinstance(left, str):
            pay_for_printf(self, left, right)
        if operator == "**" and isinstance(left, int) and isinstance(right, int):
            self._check_power(left, right)
        if operator == "*":
            self._pay_repetition(left, right)
            self._pay_repetition(right, left)
        return super().call_binop(context, operator, left, right)

    def _check_power(self, base: int, exponent: int) -> None:
        if base.bit_length() * max(exponent, 0) > _MAX_POWER_BITS:
            raise SecurityError("it computes with absurdly large numbers")

    def _pay_repetition(self, value: object, times: object) -> None:
        if isinstance(value, str | list | tuple) and isinstance(times, int):
            self.spend(self.cost(value) * max(times, 0))

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        self, owner = __self, getattr(__obj, "__self__", None)
        given = {name: value for name, value in kwargs.items() if name not in _OF_JINJA}
        self.spend(self._step)
        self.pay([owner, *args, *given.values()])
        if isinstance(owner, str):
            match __obj.__name__:
                case "join":
                    return self._join(args[0], owner)
                case "replace":
                    return self._replace(owner, *args, **given)
                case "format":
                    return Formatter(self, self).vformat(owner, args, given)
                case name if name in _PADDING:
                    self._pay_padding(owner, [*args, *given.values()])
        return super().call(__context, __obj, *args, **kwargs)

    def _pay_padding(self, text: str, values: list[Any]) -> None:
        """Of a width, or of the width of a tab, each of which takes as much."""
        width = max((value for value in values if isinstance(value, int)), default=8)
        self.spend(max(width, 0) * (1 + text.count("\t")))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if not super().is_safe_attribute(obj, attr, value):
            return False
        for kind, methods in _METHODS.items():
            if isinstance(obj, kind):
                return attr in methods or (kind is tuple and attr in getattr(obj, "_fields", ()))  # groupby's
        return isinstance(obj, Namespace | LoopContext | Macro | Undefined) or (obj is self.globals["dict"])

    def wrap_str_format(self, value: Any) -> None:
        """`call` runs str.format, which pays; its other forms are refused like any method that is not listed."""

    def _metered(self, function: Callable[..., Any], pay: Callable[[object], None]) -> Callable[..., Any]:
        first = 1 if hasattr(function, "jinja_pass_arg") else 0  # such functions are handed the context first

        @wraps(function)  # carries over that mark
        def metered(*args: Any, **kwargs: Any) -> Any:
            for value in (*args[first:], *kwargs.values()):
                pay(value)
            result = function(*args, **kwargs)
            self.pay_length(result)
            return result

        return metered

    # Filters that need to know their cost before they run

    def _join(self, items: Iterable[object], separator: str = "", attribute: str | int | None = None) -> str:
        if attribute is not None:
            items = map(make_attrgetter(self, attribute), items)
        texts = [self.text(item) for item in items]
        separator = str(separator)
        self.spend(len(separator) * len(texts))
        return separator.join(texts)

    def _replace(self, value: object, old: str, new: str, count: int | None = None) -> str:
        text, old, new = self.text(value), self.text(old), self.text(new)
        self.spend(len(new) * text.count(old))
        return text.replace(old, new, -1 if count is None else count)

    # What _Metering puts into the tree

    def _each(self, items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            self.spend(self._step)
            yield item

    def _paid(self, value: Any) -> Any:
        self.pay(value)
        return value

    def _copied(self, value: Any) -> Any:
        self.pay_length(value)
        return value

    def _concat(self, values: list[Any]) -> str:
        return "".join([self.text(value) for value in values])


# Names that no template can spell.
_INTERNAL_FILTERS = (" each", " paid", " copied", " concat")


class _Metering(NodeTransformer):
    """Rewrites a template's syntax tree so that its loops, literals, slices, keys and comparisons pay."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        return self._visit(node, iter=_filter(node.iter, " each"))

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        parts = nodes.List([self.visit(part) for part in node.nodes], lineno=node.lineno)
        return _filter(parts, " concat")

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        for operand in node.ops:
            operand.expr = _filter(operand.expr, " paid")
        return self._visit(node, expr=_filter(node.expr, " paid"))

    def visit_List(self, node: nodes.List) -> nodes.Node:
        return _filter(self._visit(node), " paid")

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        return _filter(self._visit(node), " paid")

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        if node.ctx != "load":  # the names that a loop or `set` assigns to
            return self._visit(node)
        return _filter(self._visit(node), " paid")

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        if isinstance(node.arg, nodes.Slice):
            return _filter(self._visit(node), " copied")
        return self._visit(node, arg=_filter(node.arg, " paid"))

    def _visit(self, node: nodes.Node, **changed: nodes.Node) -> nodes.Node:
        for name, value in changed.items():
            setattr(node, name, value)
        return self.generic_visit(node)


def _filter(node: nodes.Expr | nodes.Node, name: str) -> nodes.Filter:
    assert isinstance(node, nodes.Expr)
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


class _Generation(Extension):
    """`{% generation %}`, with which training marks the model's own words: what is inside is rendered as it is."""

    tags = {"generation"}  # noqa: RUF012  as Jinja declares it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_words"), [], [], body).set_lineno(line)

    def _words(self, caller: Macro) -> str:
        return str(caller())


class _Dict:
    """`dict` in a template: it makes dictionaries, and is no way to the type."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _OpaqueNamespace(Namespace):
    """Can hold anything, itself included, so its contents are not printed. Names with _ in front are refused, as in
    transformers."""

    def __init__(__self, *args: Any, **kwargs: Any) -> None:
        for name in dict(*args, **kwargs):
            _check_name(name)
        super().__init__(*args, **kwargs)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        return "<namespace>"


@jinja2.pass_context  # and so it is not applied while compiling
def _finalize(context: Context, value: object) -> str:
    environment = context.environment
    assert isinstance(environment, Sandbox)
    return environment.text(value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace cannot hold {name!r}")


def _strftime_now(format: str) -> str:
    if len(format) > _MAX_DATE:
        raise SecurityError(f"strftime_now: the format has {len(format)} characters, expected at most {_MAX_DATE}")
    return datetime.now().strftime(format)


def _raise_exception(message: object) -> NoReturn:
    raise jinja2.TemplateError(str(message))
