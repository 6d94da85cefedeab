"""Which model, on what, and in how much memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer

from edgeq.cli.options.groups import option
from edgeq.errors import UsageError

if TYPE_CHECKING:
    from edgeq.api import Model

__all__ = [
    "MODEL_HELP",
    "AdapterOption",
    "BackendOption",
    "ContextOption",
    "DraftOption",
    "KvBitsOption",
    "MemoryOption",
    "ModelArgument",
    "ModelOptions",
    "OptionalModelArgument",
    "ThreadsOption",
    "chat_template_option",
]

MODEL_HELP = (
    "Checkpoint folder, .gguf file, Hugging Face ID (Qwen/Qwen3.5-2B, OWNER/NAME:Q4_K_M), short name (qwen3.5:2b), "
    "ollama:NAME or demo."
)


def _model_argument(metavar: str) -> Any:
    return typer.Argument(metavar=metavar, envvar="EDGEQ_MODEL", show_envvar=False, help=MODEL_HELP)


ModelArgument = Annotated[str, _model_argument("MODEL")]
OptionalModelArgument = Annotated[str | None, typer.Argument(metavar="[MODEL]", help=MODEL_HELP)]
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
