"""The table of options that commands share, in groups.

A group is a frozen dataclass whose fields are options. A command takes groups as parameters, and `command` makes their
fields its options:

    @command
    def chat(*, sampling: SamplingOptions, model: ModelOptions) -> None:
        model.load().chat(**sampling.given())

The first long name of an option is its own: help shows it, and its environment variable is called after it. The names
behind it are those of llama.cpp, ollama and mlx-lm.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, fields, is_dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, get_args, get_type_hints

import typer

from edgeq.errors import UsageError
from edgeq.printable import brief, one_line

if TYPE_CHECKING:
    from edgeq.api import Model
    from edgeq.cli.tools import ToolRunner
    from edgeq.generate import GenerationSettings
    from edgeq.session.visual_settings import VisualSettings

__all__ = [
    "MODEL_HELP",
    "AdapterOption",
    "AnswerOptions",
    "BackendOption",
    "ChatDisplayOptions",
    "ContextOption",
    "ConversationOptions",
    "DisplayOptions",
    "DraftOption",
    "KvBitsOption",
    "MemoryOption",
    "ModelArgument",
    "ModelOptions",
    "OptionalModelArgument",
    "PrefixOptions",
    "PromptArgument",
    "PromptOptions",
    "SamplingOptions",
    "ThreadsOption",
    "ToolOptions",
    "VisualOptions",
    "chat_template_option",
    "command",
    "option",
]

MODEL_HELP = (
    "Checkpoint folder, .gguf file, Hugging Face ID (Qwen/Qwen3.5-2B, OWNER/NAME:Q4_K_M), short name (qwen3.5:2b), "
    "ollama:NAME or demo."
)


def option(
    *names: str, help: str, metavar: str | None = None, default: str | None = None, minimum: int | None = None,
    env: bool = True,
) -> Any:  # fmt: skip
    """An option, with an environment variable if `env`; `default` says in words what holds without it."""
    own = next(name for name in names if name.startswith("--")).split("/")[0]
    variable = "EDGEQ_" + own.removeprefix("--").replace("-", "_").upper()
    return typer.Option(
        *names, help=help, metavar=metavar, show_default=default or True, envvar=variable if env else None,
        show_envvar=False, min=minimum,
    )  # fmt: skip


def _model_argument(metavar: str) -> Any:
    return typer.Argument(metavar=metavar, envvar="EDGEQ_MODEL", show_envvar=False, help=MODEL_HELP)


ModelArgument = Annotated[str, _model_argument("MODEL")]
OptionalModelArgument = Annotated[str | None, typer.Argument(metavar="[MODEL]", help=MODEL_HELP)]
PromptArgument = Annotated[
    list[str] | None, typer.Argument(metavar="[PROMPT]", help="The prompt, in place of --prompt.")
]
BackendOption = Annotated[str, option("--backend", metavar="NAME", help="auto, cpu, mlx or numpy.")]
ThreadsOption = Annotated[
    int | None,
    option("--threads", "-t", metavar="N", default="chosen by the backend", minimum=1, help="Number of CPU threads."),
]


ContextOption = Annotated[
    int | None,
    option(
        "--context", "-c", "--ctx-size", "--ctx", "--num-ctx", metavar="N",
        default="the model's maximum", help="Context window, in tokens.",
    ),
]  # fmt: skip
KvBitsOption = Annotated[
    int | None,
    option(
        "--kv-bits", metavar="N", default="chosen by the backend (cpu: 16)",
        help="KV cache precision in bits: 16, 8 or 4.",
    ),
]  # fmt: skip
MemoryOption = Annotated[
    str | None,
    option(
        "--memory", metavar="SIZE", default="the control group's limit, or none",
        help="Maximum memory of the whole process: 1.5G, 1500M, 1.5GiB, 50% or none.",
    ),
]  # fmt: skip


DraftOption = Annotated[
    str,
    option(
        "--draft", "--spec-type", metavar="HOW",
        help="Draft tokens ahead, which changes the speed and not the text: auto, off, mtp, ngram or 1 to 8 a pass.",
    ),
]  # fmt: skip


AdapterOption = Annotated[
    list[str] | None,
    option(
        "--adapter", "--adapter-path", "--lora", "--lora-scaled", metavar="PATH[:SCALE]", default="none", env=False,
        help="Merge a LoRA adapter of PEFT, mlx-lm or llama.cpp into the model: path or Hugging Face ID; repeatable.",
    ),
]  # fmt: skip


def chat_template_option(*, env: bool) -> Any:
    """--chat-template, for a conversation or for what is written."""
    return option(
        "--chat-template", "--chat-template-file", metavar="FILE|NAME", default="the model's own", env=env,
        help="Chat template: a file, or the name of one of the model's.",
    )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelOptions:
    """Which model runs, and on what."""

    title: ClassVar[str] = "Model"

    model: Annotated[str | None, _model_argument("MODEL")] = None
    named: Annotated[
        str | None,
        typer.Option(
            "--model", "-m", "-hf", "--hf-repo", metavar="MODEL", hidden=True, help="The model, as llama.cpp has it."
        ),
    ] = None  # fmt: skip
    backend: BackendOption = "auto"
    threads: ThreadsOption = None
    context: ContextOption = None
    kv_bits: KvBitsOption = None

    rope_scaling: Annotated[
        str | None,
        option(
            "--rope-scaling", metavar="KIND:FACTOR", default="what the checkpoint says",
            help="Stretch the context, as in yarn:4; also linear:FACTOR, none.",
        ),
    ] = None  # fmt: skip

    mmproj: Annotated[
        Path | None,
        option(
            "--mmproj", "-mm", metavar="FILE", default="the one in the model's file or folder",
            help="Vision tower of a .gguf model.",
        ),
    ] = None  # fmt: skip
    adapter: AdapterOption = None
    draft: DraftOption = "auto"
    memory: MemoryOption = None
    lock: Annotated[
        bool, option("--lock", "--mlock", help="Lock the weights in memory: for boards that swap.")
    ] = False  # fmt: skip

    @property
    def name(self) -> str:
        """The model as the user calls it."""
        if self.named and self.model and self.named != self.model:
            raise UsageError(
                f"two models given: {self.model} and {self.named}", hint="give one; a prompt beside -m needs -p"
            )
        if not (name := self.named or self.model):
            raise UsageError("no model given", hint="try `edgeq chat demo`, or set EDGEQ_MODEL")
        return name

    def load(
        self, chat_template: str | None = None, saved: Mapping[str, Any] | None = None,
        told: Callable[[str], bool] = lambda _: True,
    ) -> Model:  # fmt: skip
        """The loaded model, with another chat template if one is given.

        saved: options of `edgeq.load` that hold where `told` says that nothing was asked for by that name.
        """
        from edgeq.api import load
        from edgeq.cli.console import prefill_bar
        from edgeq.generate import check_draft

        check_draft(self.draft)  # before a model is downloaded and loaded for nothing
        options: dict[str, Any] = {
            "backend": self.backend, "threads": self.threads, "context": self.context, "kv_bits": self.kv_bits,
            "rope_scaling": self.rope_scaling, "mmproj": self.mmproj, "adapter": self.adapter,
            "chat_template": chat_template, "memory": self.memory, "lock": self.lock,
        }  # fmt: skip
        before = {name: value for name, value in (saved or {}).items() if name == "model" or not told(name)}
        name = before.pop("model", None)
        if name is None or told("model") or told("named"):
            name = self.name
        with prefill_bar("reading the model", nbytes=True) as bar:
            return load(name, **options | before, on_read=bar)


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptOptions:
    """Where the prompt comes from."""

    title: ClassVar[str] = "Options"

    prompt: Annotated[
        str | None, option("--prompt", "-p", metavar="TEXT", env=False, help="The prompt; - reads stdin.")
    ] = None
    file: Annotated[
        Path | None,
        option("--file", "-f", "--prompt-file", metavar="FILE", env=False, help="Read the prompt from a text file."),
    ] = None

    no_stdin: Annotated[
        bool, option("--no-stdin", env=False, help="Do not read stdin, even if it is a pipe that stays open.")
    ] = False

    @property
    def given(self) -> bool:
        return self.prompt is not None or self.file is not None or self.no_stdin

    def text(self, words: Sequence[str] | None = None, *, stdin: bool = True, needed: bool = True) -> str:
        """--prompt or `words` in its place, the file and, if `stdin` is not taken by something else, what was piped in,
        joined; UsageError if a prompt is `needed` and none given."""
        from edgeq.cli.prompt import joined_prompt

        if words and self.prompt is not None:
            raise UsageError(f"two prompts given: {' '.join(words)} and {self.prompt}", hint="give one")
        if self.no_stdin and (self.prompt == "-" or not stdin):
            raise UsageError("--no-stdin is given, and - reads stdin", hint="leave one of them out")
        prompt = " ".join(words) if words else self.prompt
        return joined_prompt(prompt, self.file, stdin=stdin and not self.no_stdin, needed=needed)


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
class VisualOptions:
    """Pictures beside the prompt, and how large they become."""

    title: ClassVar[str] = "Pictures"

    image: Annotated[
        list[str] | None,
        option(
            "--image", metavar="FILE", default="none", env=False,
            help="Show an image: a file, data URL, - for stdin or demo; repeatable.",
        ),
    ] = None  # fmt: skip
    video: Annotated[
        list[str] | None,
        option(
            "--video", metavar="FILE", default="none", env=False,
            help="Show a video: a file or a folder of frames; repeatable.",
        ),
    ] = None  # fmt: skip
    image_tokens: Annotated[
        int | None,
        option(
            "--image-tokens", "--image-max-tokens", metavar="N", default="1024", minimum=1,
            help="Maximum tokens of an image; larger ones are reduced.",
        ),
    ] = None  # fmt: skip
    video_tokens: Annotated[
        int | None,
        option("--video-tokens", metavar="N", default="2048", minimum=1, help="Maximum tokens of a video."),
    ] = None
    min_pixels: Annotated[
        int | None,
        option(
            "--min-pixels", metavar="N", default="the checkpoint's", minimum=1,
            help="Enlarge images with fewer pixels, and videos with fewer in all frames.",
        ),
    ] = None  # fmt: skip
    max_pixels: Annotated[
        int | None,
        option(
            "--max-pixels", metavar="N", default="from the maximum of tokens", minimum=1,
            help="Reduce images with more pixels, and videos with more in all frames.",
        ),
    ] = None  # fmt: skip
    fps: Annotated[
        float | None,
        option(
            "--fps",
            metavar="X",
            default="the checkpoint's: 2",
            help="Frames to take of each second of a video; frames in a second of a folder's.",
        ),
    ] = None
    max_frames: Annotated[
        int | None,
        option("--max-frames", metavar="N", default="64", minimum=1, help="Maximum frames to take of a video."),
    ] = None
    outer_vision_tokens: Annotated[
        bool,
        option(
            "--outer-vision-tokens/--no-outer-vision-tokens", default="on",
            help="Keep the vision tokens around a whole video, as transformers does and vLLM does not.",
        ),
    ] = True  # fmt: skip

    def named(self) -> tuple[list[Any], list[Any]]:
        """The images and the videos; what `-` stands for is read from stdin."""
        from edgeq.cli.pictures import named

        return named(self.image), named(self.video)

    @property
    def takes_stdin(self) -> bool:
        """Whether one of them is `-`."""
        return "-" in [*(self.image or ()), *(self.video or ())]

    def settings(self, base: VisualSettings | None = None) -> VisualSettings:
        """Those of a conversation, or `base`, with what was asked for; UsageError for a value out of range."""
        from edgeq.session.visual_settings import CHAT_VISUALS

        given = {name: getattr(self, name) for name in (field.name for field in fields(CHAT_VISUALS))}
        return (base or CHAT_VISUALS).replace(**given)


_KWARGS_EXAMPLE = """--chat-template-kwargs '{"enable_thinking": true}'"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ConversationOptions:
    """How the model is to behave in a conversation."""

    title: ClassVar[str] = "Conversation"

    system: Annotated[
        str | None, option("--system", "-sys", "--system-prompt", metavar="TEXT", default="none", help="System prompt.")
    ] = None
    system_file: Annotated[
        Path | None,
        option(
            "--system-file", "-sysf", "--system-prompt-file", metavar="FILE", default="none", env=False,
            help="Read the system prompt from a text file.",
        ),
    ] = None  # fmt: skip
    messages: Annotated[
        Path | None,
        option(
            "--messages", metavar="FILE", default="none", env=False,
            help="Go on with the messages in a JSON file, as OpenAI's interfaces have them; - reads stdin.",
        ),
    ] = None  # fmt: skip
    document: Annotated[
        list[Path] | None,
        option(
            "--document", metavar="FILE", default="none", env=False,
            help="Talk about a text file, which is read once and kept; repeatable.",
        ),
    ] = None  # fmt: skip
    session: Annotated[
        Path | None,
        option(
            "--session", metavar="FILE", default="none", env=False,
            help="Go on with the conversation in this file, or begin one there; it is saved after every turn.",
        ),
    ] = None  # fmt: skip
    assistant_prefix: Annotated[
        str | None,
        option(
            "--assistant-prefix", metavar="TEXT", default="none", env=False,
            help="Begin the answer with this text, without thinking (single prompt only).",
        ),
    ] = None  # fmt: skip
    overflow: Annotated[
        str,
        option(
            "--overflow", metavar="HOW",
            help="When the context window is full: stop, or shift, which forgets the oldest turns.",
        ),
    ] = "stop"  # fmt: skip
    think: Annotated[
        bool | None,
        option(
            "--think/--no-think", " /--nothink", default="the chat template's choice", help="Think before answering."
        ),
    ] = None
    thinking_budget: Annotated[
        int | None,
        option(
            "--thinking-budget", "--reasoning-budget", metavar="N", default="no limit",
            help="Maximum thinking tokens; then the answer starts.",
        ),
    ] = None  # fmt: skip

    chat_template: Annotated[str | None, chat_template_option(env=True)] = None
    chat_template_kwargs: Annotated[
        str | None,
        option(
            "--chat-template-kwargs", metavar="JSON", default="none",
            help="Variables for the chat template, as a JSON object.",
        ),
    ] = None  # fmt: skip

    def given(self) -> dict[str, Any]:
        """Arguments for `Model.chat`."""
        from edgeq.cli.prompt import file_text, without_last_newline

        system = self.system
        if self.system_file is not None:
            if system is not None:
                raise UsageError("two system prompts given, with --system and --system-file", hint="give one")
            system = without_last_newline(file_text(self.system_file, lenient=True))
        if self.overflow not in ("stop", "shift"):
            raise UsageError(f"--overflow is stop or shift, got {self.overflow}")
        kwargs = self._template_kwargs()
        return {
            "documents": self.documents(),
            "overflow": self.overflow,
            "system": system,
            "thinking": self.think,
            "thinking_budget": self.thinking_budget,
            **({"template_kwargs": kwargs} if kwargs else {}),
        }

    def documents(self) -> list[tuple[str, str]]:
        """The documents by name, as `Model.chat` takes them."""
        from edgeq.cli.prompt import file_text

        return [(file.name, file_text(file, lenient=True)) for file in self.document or ()]

    def _template_kwargs(self) -> dict[str, Any]:
        try:
            kwargs = json.loads(self.chat_template_kwargs or "{}")
        except (ValueError, RecursionError) as error:
            raise UsageError(
                f"--chat-template-kwargs is not JSON: {one_line(error)}", hint=f"as in {_KWARGS_EXAMPLE}"
            ) from None
        if not isinstance(kwargs, dict):
            raise UsageError(
                f"--chat-template-kwargs is {brief(kwargs)}, expected an object", hint=f"as in {_KWARGS_EXAMPLE}"
            )
        from edgeq.text.messages import check_kwargs

        check_kwargs(kwargs)  # before a model is downloaded and loaded for nothing
        return kwargs


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixOptions:
    """What is kept of what was read, for later."""

    title: ClassVar[str] = "Prefixes"

    cache_dir: Annotated[
        str | None,
        option(
            "--cache-dir", metavar="FOLDER[:SIZE]", default="memory only",
            help="Keep what was read in FOLDER too, so that no later run reads it again.",
        ),
    ] = None  # fmt: skip
    cache_size: Annotated[
        str | None,
        option(
            "--cache-size", metavar="SIZE", default="4G, or half of what is free on the disk",
            help="Maximum size of the folder, as in 500M or 4G; alone, of the one in the user's cache.",
        ),
    ] = None  # fmt: skip

    def use(self, model: Model, *, once: bool, default: bool = False) -> None:
        """Let a model keep its prefixes as is asked for; nothing in memory where it is asked only `once`. default: on
        disk in any case.
        """
        from edgeq.session.prefix_files import default_folder, split_folder

        folder, size = (default_folder(), None) if self.cache_dir is None else split_folder(self.cache_dir)
        if size is not None and self.cache_size is not None:
            raise UsageError("two sizes given, with --cache-dir and --cache-size", hint="give one")
        if default or self.cache_dir is not None or self.cache_size is not None:
            model.keep_prefixes(folder, self.cache_size or size)
        elif once:
            model.prefixes.limit = 0


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


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolOptions:
    """Functions that the model may call, and what runs them."""

    title: ClassVar[str] = "Tools"

    tools: Annotated[
        Path | None,
        option(
            "--tools", metavar="FILE", default="none", env=False,
            help="JSON file with the functions that the model may call, as in OpenAI's interface.",
        ),
    ] = None  # fmt: skip
    tools_run: Annotated[
        str | None,
        option(
            "--tools-run", metavar="COMMAND", default="none", env=False,
            help="Run COMMAND NAME for each call, with the call as JSON on its stdin; what it prints is the result.",
        ),
    ] = None  # fmt: skip
    yes: Annotated[bool, option("--yes", "-y", env=False, help="Run it without asking.")] = False
    tool_rounds: Annotated[
        int, option("--tool-rounds", metavar="N", minimum=1, help="Maximum rounds of calls for a question.")
    ] = 8
    tool_timeout: Annotated[
        int, option("--tool-timeout", metavar="SECONDS", minimum=1, help="Time limit of a call.")
    ] = 60

    def given(self) -> dict[str, Any]:
        """Arguments for `Model.chat`."""
        from edgeq.cli.tools import read_tools

        return {"tools": read_tools(self.tools)} if self.tools else {}

    def runner(self) -> ToolRunner | None:
        """What runs the calls; None if nothing does. UsageError for what cannot be run, or not be asked for."""
        from edgeq.cli.tools import ToolRunner

        if self.tools_run is None:
            if self.yes:
                raise UsageError("--yes is about --tools-run, which is not given")
            return None
        if self.tools is None:
            raise UsageError("--tools-run needs --tools, the functions that the model may call")
        return ToolRunner(self.tools_run, ask=not self.yes, rounds=self.tool_rounds, timeout=self.tool_timeout)


# --- from groups to options ------------------------------------------------------------------------------------------


def command(function: Callable[..., None]) -> Callable[..., None]:
    """`function` for typer: instead of each parameter that is a group it has an option for every field of the group.

    The default of such a parameter, an instance of the group, holds the defaults of the options.
    """
    hints = get_type_hints(function, include_extras=True)
    groups = {name: hint for name, hint in hints.items() if isinstance(hint, type) and is_dataclass(hint)}
    parameters = []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.name in groups:
            parameters += _options(groups[parameter.name], parameter.default)
        else:
            parameters.append(parameter.replace(annotation=hints[parameter.name]))

    @wraps(function)
    def run(**values: Any) -> None:
        for name, group in groups.items():
            values[name] = group(**{field.name: values.pop(field.name) for field in fields(group)})
        function(**values)

    vars(run)["__signature__"] = inspect.Signature(parameters)
    return run


def _options(group: Any, given: Any) -> list[inspect.Parameter]:
    """The fields of a group as parameters, under its title; defaults from the instance `given` where there is one."""
    hints = get_type_hints(group, include_extras=True)
    parameters = []
    for field in fields(group):
        kind, info = get_args(hints[field.name])
        info = copy(info)
        info.rich_help_panel = group.title
        default = field.default if given is inspect.Parameter.empty else getattr(given, field.name)
        parameters.append(
            inspect.Parameter(
                field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, info]
            )
        )
    return parameters
