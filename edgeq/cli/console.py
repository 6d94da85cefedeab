"""What the commands print: data to stdout, everything else to stderr; no colour where nobody sees it."""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from edgeq.errors import EdgeqError
from edgeq.generate import StopReason
from edgeq.reply import Reply

__all__ = ["dim", "error_line", "peak_memory", "prefill_bar", "report_error", "usage_line"]

stderr = Console(stderr=True, highlight=False)


def dim(text: str) -> str:
    """`text` greyed out, if stderr is a terminal that shows it."""
    return f"\033[2m{text}\033[0m" if sys.stderr.isatty() and not os.environ.get("NO_COLOR") else text


def error_line(error: EdgeqError) -> str:
    """An error for the person at the prompt."""
    hint = f"\nhint: {error.hint}" if error.hint else ""
    return f"error: {error.message}{hint}"


def report_error(error: EdgeqError) -> None:
    """Print an error and its hint to stderr."""
    print(error_line(error), file=sys.stderr)


def peak_memory() -> int:
    """Largest resident set of this process so far, bytes; the mapped pages of the model count."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


_ENDINGS = {
    StopReason.LENGTH: "stopped at --max-tokens",
    StopReason.LOOP: "stopped: the reply went round in circles",
    StopReason.CONTEXT_FULL: "stopped: the context is full",
    StopReason.INTERRUPTED: "interrupted",
}
_CUTS = {
    StopReason.LENGTH: "thinking cut at --thinking-budget",
    StopReason.LOOP: "thinking cut: it went round in circles",
}


def usage_line(reply: Reply) -> str:
    """Prompt (cached and new) and generated tokens with their speeds, peak memory, and what cut the reply short."""
    usage, finish = reply.usage, reply.finish
    new = usage.prompt_tokens - usage.cached_tokens
    parts = [
        f"prompt {usage.prompt_tokens} tokens ({usage.cached_tokens} cached, {new} new), "
        f"{usage.prompt_tok_per_s:.1f} tok/s",
        f"generated {usage.generated_tokens} tokens, {usage.generate_tok_per_s:.1f} tok/s",
        f"peak memory {peak_memory() / 1e6:,.0f} MB",
    ]
    if finish.thinking_cut in _CUTS:
        parts.append(_CUTS[finish.thinking_cut])
    if finish.reason in _ENDINGS:
        parts.append(_ENDINGS[finish.reason])
    return " | ".join(parts)


class PrefillBar:
    """A progress bar over a long prompt: shown on a terminal once it has taken a second, gone when it is done."""

    def __init__(self) -> None:
        self._bar: Progress | None = None
        self._started = monotonic()

    def __call__(self, done: int, total: int) -> None:
        if done == 0:
            self._started = monotonic()
        if self._bar is None and stderr.is_terminal and done < total and monotonic() - self._started > 1:
            columns = (TextColumn("reading the prompt"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=stderr, transient=True)
            self._bar.add_task("", total=total)
            self._bar.start()
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=done)
            if done >= total:
                self.close()

    def close(self) -> None:
        """Take the bar off the screen, wherever it was."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


@contextmanager
def prefill_bar() -> Iterator[PrefillBar]:
    """A PrefillBar that is gone afterwards, however the work ended."""
    bar = PrefillBar()
    try:
        yield bar
    finally:
        bar.close()
