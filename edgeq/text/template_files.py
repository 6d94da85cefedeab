"""Where a checkpoint keeps its chat templates: one, or several by name, in files or fields that changed over the years.

In a folder the first of these that has a default template counts, as in transformers: `chat_template.jinja` with
`additional_chat_templates/NAME.jinja` beside it, `chat_template.json` (older processors), and the field `chat_template`
of processor_config.json and of tokenizer_config.json. The fields hold a text, or a list of {"name": ..., "template":
...}. What is none of that is told when a template is wanted, and stops nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from edgeq.config import read_json
from edgeq.errors import ModelError, UsageError
from edgeq.inputs import exists, expand_user, is_folder, read_text
from edgeq.printable import brief, one_line, printable

__all__ = [
    "ANOTHER_TEMPLATE",
    "DEFAULT",
    "FOLDER",
    "NamedTemplate",
    "Templates",
    "place",
    "read_templates",
    "templates_in",
]

ANOTHER_TEMPLATE = (
    "`edgeq chat MODEL --chat-template FILE` uses another, in Python load(chat_template=); `edgeq generate` needs none"
)
DEFAULT, WITH_TOOLS = "default", "tool_use"
FOLDER, _MAIN = "additional_chat_templates", "chat_template.jinja"
_UNFIT = re.compile(r"[^A-Za-z0-9_-]")  # characters of a name that a file's cannot have everywhere
_SURROGATE = re.compile("[\ud800-\udfff]")
_MOST = 64  # templates of a checkpoint; of the family's none has more than one


class NamedTemplate(NamedTuple):
    """The text of a template, and what messages call it."""

    source: str
    where: str


@dataclass(frozen=True)
class Templates:
    """A checkpoint's chat templates by name. problems: what stood in a template's place and is none."""

    owner: str = "the model"
    found: Mapping[str, NamedTemplate] = field(default_factory=dict)
    problems: tuple[str, ...] = ()
    asked_for: bool = False  # the default is the user's choice

    def pick(self, *, tools: bool = False) -> NamedTemplate | None:
        """The template for a conversation, which is "tool_use" with tools, if there is one; None without any.

        ModelError if the checkpoint has some, but none that could be meant.
        """
        if tools and not self.asked_for and WITH_TOOLS in self.found:
            return self.found[WITH_TOOLS]
        if DEFAULT in self.found or len(self.found) == 1:
            return self.found.get(DEFAULT) or next(iter(self.found.values()))
        if self.found:
            raise ModelError(
                f"{self.owner} has several chat templates and no default: {self.names}",
                hint="choose one: `edgeq chat MODEL --chat-template NAME`, in Python load(chat_template=)",
            )
        if self.problems:
            raise ModelError(
                f"{self.owner} has no chat template that can be used: {self.problems[0]}", hint=ANOTHER_TEMPLATE
            )
        return None

    def choose(self, what: str | Path) -> Templates:
        """These with another default: the one called `what`, or the file of this name, or `what` itself where it is a
        template's text. UsageError if it is none of them.
        """
        if not isinstance(what, str | Path):
            raise UsageError(f"chat_template must be a file, a name or a template's text, got {brief(what)}")
        if isinstance(what, str) and what in self.found:
            chosen = self.found[what]
        elif isinstance(what, str) and ("{{" in what or "{%" in what):
            chosen = NamedTemplate(what, "the chat template given")
        elif what and exists(path := expand_user(Path(what))):
            chosen = _only(path)
        else:
            known = f"the model's are called {self.names}" if self.found else "the model has none of its own"
            raise UsageError(
                f"no chat template or file is called {brief(str(what))}",
                hint=f"give a file with a template; {known}",
            )
        return replace(self, found={**self.found, DEFAULT: chosen}, asked_for=True)

    @property
    def names(self) -> str:
        """Their names, for people."""
        return printable(", ".join(self.found))


def read_templates(folder: Path) -> Templates:
    """Those of a checkpoint folder; raises nothing."""
    found, problems = dict[str, NamedTemplate](), list[str]()
    places = [_files(folder, problems), *(_field(folder / name, problems) for name in _FIELDS)]
    for templates in places:
        if DEFAULT not in found and not problems:  # what cannot be read is told, not passed over for the next
            for name, template in templates:
                found.setdefault(name, template)
    return Templates(str(folder), found, tuple(problems))


def templates_in(value: object, where: str, problems: list[str]) -> Iterator[tuple[str, NamedTemplate]]:
    """The templates in a field: a text, a list of {"name", "template"}, an object of texts by name."""
    pairs: list[tuple[object, object]] = []
    if isinstance(value, str):
        pairs = [(DEFAULT, value)]
    elif isinstance(value, list):
        entries = [entry if isinstance(entry, Mapping) else {} for entry in value[:_MOST]]
        pairs = [(entry.get("name"), entry.get("template")) for entry in entries]
    elif isinstance(value, Mapping):
        pairs = list(value.items())[:_MOST]
    elif value is not None:
        problems.append(f"{where} is {brief(value)}, expected a text or a list of named ones")
    for name, source in pairs:
        place = where if name == DEFAULT and len(pairs) == 1 else f"{where}[{brief(name)}]"
        if not isinstance(name, str) or not isinstance(source, str):
            problems.append(f"{place} is {brief(source)}, expected a text by name")
        elif _SURROGATE.search(name + source):
            problems.append(f"{printable(place)} holds half a character")
        elif source.strip():
            yield name, NamedTemplate(source, printable(place))


def _files(folder: Path, problems: list[str]) -> Iterator[tuple[str, NamedTemplate]]:
    named = folder / FOLDER
    paths = sorted(named.glob("*.jinja"))[:_MOST] if is_folder(named) else []
    for name, path in [*((path.name.removesuffix(".jinja"), path) for path in paths), (DEFAULT, folder / _MAIN)]:
        if exists(path):
            try:
                source = read_text(path)
            except (OSError, UnicodeDecodeError) as error:
                problems.append(f"{path} cannot be read: {_reason(error)}")
                continue
            if source.strip():
                yield name, NamedTemplate(source, printable(path.relative_to(folder).as_posix()))


def place(name: str) -> str:
    """Where a folder keeps the template of this name."""
    return _MAIN if name == DEFAULT else f"{FOLDER}/{_UNFIT.sub('_', name)[:100]}.jinja"


_FIELDS = ("chat_template.json", "processor_config.json", "tokenizer_config.json")  # files, in this order


def _field(path: Path, problems: list[str]) -> Iterator[tuple[str, NamedTemplate]]:
    if not exists(path):
        return
    try:
        value = read_json(path).get("chat_template")
    except ModelError as error:
        problems.append(error.message)
        return
    yield from templates_in(value, f"{path.name}: chat_template", problems)


def _only(path: Path) -> NamedTemplate:
    """The template in a file: of Jinja, or a JSON file with the field."""
    problems = list[str]()
    if path.suffix.lower() == ".json":
        found = dict(_field(path, problems))
        if template := found.get(DEFAULT) or next(iter(found.values()), None):
            return template
        raise ModelError(problems[0] if problems else f"{path} has no chat_template")
    try:
        source = read_text(path, streams=True)
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"{path} cannot be read: {_reason(error)}") from None
    if not source.strip():
        raise ModelError(f"{path} is empty, expected a chat template")
    return NamedTemplate(source, str(path))


def _reason(error: OSError | UnicodeDecodeError) -> str:
    return (isinstance(error, OSError) and error.strerror) or one_line(error)
