"""How a reply is generated, what it has to match, and how it is shown."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from edgeq.cli.options.groups import option
from edgeq.errors import UsageError

if TYPE_CHECKING:
    from edgeq.generate import GenerationSettings

__all__ = ["AnswerOptions", "ChatDisplayOptions", "DisplayOptions", "JsonOptions", "SamplingOptions"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DisplayOptions:
    """How replies are shown."""

    title: ClassVar[str] = "Display"

    quiet: Annotated[
        bool, option("--quiet", "-q", help="Print replies and errors alone: no greeting, statistics or costs.")
    ] = False
    wrap: Annotated[
        bool,
        option(
            "--wrap/--no-wrap", " /--nowordwrap", default="on",
            help="Break lines between words on a terminal; pipes and /copy get the text as it is.",
        ),
    ] = True  # fmt: skip
    markdown: Annotated[bool, option("--markdown", help="Render Markdown on a terminal, a paragraph at a time.")] = (
        False
    )

    @property
    def thinking_hidden(self) -> bool:
        return False


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatDisplayOptions(DisplayOptions):
    """How replies that may begin with thinking are shown."""

    hide_thinking: Annotated[
        bool, option("--hide-thinking", "--hidethinking", help="Do not show the thinking, only the answer.")
    ] = False

    @property
    def thinking_hidden(self) -> bool:
        return self.hide_thinking


@dataclass(frozen=True, slots=True, kw_only=True)
class JsonOptions:
    """A reply for programs."""

    title: ClassVar[str] = "Options"

    as_json: Annotated[
        bool, option("--json", env=False, help="Print a single reply as a JSON object instead of its text.")
    ] = False
    stream: Annotated[
        bool,
        option("--stream", env=False, help="With --json: an object per piece, a line each (NDJSON), then the whole."),
    ] = False

    def check(self, *, logprobs: int | None) -> None:
        """UsageError where something is asked for that only a reply in JSON has."""
        if self.as_json:
            return
        if logprobs is not None:
            raise UsageError("--logprobs prints to the JSON object of a reply", hint="add --json")
        if self.stream:
            raise UsageError("--stream prints JSON objects", hint="add --json; text comes piece by piece without it")


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingOptions:
    """GenerationSettings as options: None is what the model recommends."""

    title: ClassVar[str] = "Sampling"

    max_tokens: Annotated[
        int | None,
        option(
            "--max-tokens", "-n", "--n-predict", "--num-predict", "--predict", metavar="N",
            default="until the context is full", help="Maximum tokens to generate, excluding thinking.",
        ),
    ] = None  # fmt: skip
    max_total_tokens: Annotated[
        int | None,
        option(
            "--max-total-tokens", metavar="N", default="until the context is full",
            help="Maximum tokens to generate, thinking and answer together.",
        ),
    ] = None  # fmt: skip
    temp: Annotated[
        float | None,
        option(
            "--temp", "--temperature", metavar="X", default="recommended",
            help="Sampling temperature, 0 to 10; 0 is greedy.",
        ),
    ] = None  # fmt: skip
    top_k: Annotated[
        int | None,
        option("--top-k", metavar="N", default="recommended", help="Sample from the N most likely tokens; 0 disables."),
    ] = None
    top_p: Annotated[
        float | None,
        option(
            "--top-p", metavar="X", default="recommended",
            help="Sample from the most likely tokens that together reach probability X; 1 disables.",
        ),
    ] = None  # fmt: skip
    min_p: Annotated[
        float | None,
        option(
            "--min-p", metavar="X", default="recommended",
            help="Drop tokens less likely than X times the most likely one; 0 disables.",
        ),
    ] = None  # fmt: skip
    presence_penalty: Annotated[
        float | None,
        option(
            "--presence-penalty", metavar="X", default="recommended",
            help="Penalize tokens already in the reply, -2 to 2; ignores the prompt.",
        ),
    ] = None  # fmt: skip
    frequency_penalty: Annotated[
        float | None,
        option(
            "--frequency-penalty", metavar="X", default="recommended",
            help="Penalize a token once per occurrence in the reply, -2 to 2.",
        ),
    ] = None  # fmt: skip
    repetition_penalty: Annotated[
        float | None,
        option(
            "--repetition-penalty", "--repeat-penalty", metavar="X", default="recommended",
            help="Penalize tokens in the prompt or the reply; 1 disables.",
        ),
    ] = None  # fmt: skip
    seed: Annotated[
        int | None,
        option("--seed", "-s", metavar="N", default="random", help="The same seed gives the same reply."),
    ] = None
    stop: Annotated[
        list[str] | None,
        option("--stop", metavar="TEXT", default="none", help="Stop before this string; repeatable."),
    ] = None
    loop_guard: Annotated[
        bool | None,
        option("--loop-guard/--no-loop-guard", default="on", help="Stop when the output repeats itself."),
    ] = None

    @classmethod
    def of(cls, settings: GenerationSettings) -> SamplingOptions:
        """Options whose defaults are `settings`."""
        own = {field.name: getattr(settings, field.name) for field in fields(cls) if field.name != "temp"}
        return cls(**own, temp=settings.temperature)

    def given(self) -> dict[str, Any]:
        """Those that are not None, as fields of GenerationSettings; UsageError for a value out of range."""
        from edgeq.generate import GenerationSettings

        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        values |= {"temperature": values.pop("temp"), "stop": tuple(self.stop) if self.stop else None}
        given = {name: value for name, value in values.items() if value is not None}
        GenerationSettings(**given)  # before a model is downloaded and loaded for nothing
        return given


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerOptions:
    """What the answer is to fit, and what is told about its tokens: the rest of GenerationSettings."""

    title: ClassVar[str] = "Structured output"

    schema: Annotated[
        str | None,
        option(
            "--schema", "--json-schema", "--json-schema-file", "-j", "-jf", metavar="FILE", default="none", env=False,
            help="JSON schema that the answer fits: a file, or the schema itself.",
        ),
    ] = None  # fmt: skip
    regex: Annotated[
        str | None,
        option("--regex", metavar="REGEX", default="none", env=False, help="Regex that the whole answer matches."),
    ] = None
    grammar: Annotated[
        str | None,
        option(
            "--grammar", "--grammar-file", metavar="FILE", default="none", env=False,
            help="Grammar that the answer follows, in Lark or GBNF: a file, or the grammar itself.",
        ),
    ] = None  # fmt: skip
    logit_bias: Annotated[
        list[str] | None,
        option(
            "--logit-bias", "-l", metavar="ID=X", default="none", env=False,
            help="Add X, -100 to 100, to the logit of a token; repeatable.",
        ),
    ] = None  # fmt: skip
    logprobs: Annotated[
        int | None,
        option(
            "--logprobs", metavar="N", default="none", env=False,
            help="Print log probabilities, with those of the N most likely tokens (with --json).",
        ),
    ] = None  # fmt: skip

    def given(self) -> dict[str, Any]:
        """Those that are not None, as fields of GenerationSettings; UsageError for what cannot be done."""
        from edgeq.cli.answers import read_biases, read_shape
        from edgeq.generate import GenerationSettings

        given: dict[str, Any] = {
            "schema": read_shape("schema", self.schema),
            "regex": self.regex,
            "grammar": read_shape("grammar", self.grammar),
            "logit_bias": read_biases(self.logit_bias) if self.logit_bias else None,
            "logprobs": self.logprobs,
        }
        given = {name: value for name, value in given.items() if value is not None}
        if (shape := GenerationSettings(**given).shape) is not None:  # before a model is downloaded for nothing
            from edgeq.text.grammar import check_shape

            check_shape(shape)
        return given
