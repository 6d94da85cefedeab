"""A reply at the terminal, its figures, and the same for programs."""

from __future__ import annotations

import sys
from typing import Any

from edgeq.backends.ops import Ops
from edgeq.cli.console import dim, peak_memory_text, say, show_json, warn
from edgeq.cli.options import DisplayOptions
from edgeq.cli.page import Hidden, Page, page_on
from edgeq.generate import StopReason
from edgeq.printable import brief
from edgeq.session.reply import Reply, Usage
from edgeq.text.tokenizer import Tokenizer

__all__ = ["hear", "print_json", "reply_object", "show_reply", "usage_line"]

_ENDINGS = {
    StopReason.LENGTH: "stopped at --max-tokens",
    StopReason.LOOP: "stopped: the reply was repeating itself",
    StopReason.CONTEXT_FULL: "stopped: the context window is full",
    StopReason.INTERRUPTED: "interrupted",
}
_CUTS = {
    StopReason.LENGTH: "thinking cut at --thinking-budget",
    StopReason.LOOP: "thinking cut: it was repeating itself",
}


MUCH = 64  # tokens of a prompt, from which on it is told why they had to be read


def usage_line(reply: Reply, ops: Ops[Any, Any]) -> str:
    """Prompt (cached and new) and generated tokens with their speeds, peak memory, and what cut the reply short."""
    usage, finish, backend = reply.usage, reply.finish, ops.peak_memory()
    new = usage.prompt_tokens - usage.cached_tokens
    parts = [
        f"prompt {usage.prompt_tokens} tokens ({usage.cached_tokens} cached, {new} new), "
        f"{usage.prompt_tok_per_s:.1f} tokens/s",
        f"generated {usage.generated_tokens} tokens, {usage.generate_tok_per_s:.1f} tokens/s",
        peak_memory_text() + (f" ({ops.name} {backend / 1e6:,.0f} MB)" if backend is not None else ""),
    ]
    if told := _miss_text(usage):
        parts.insert(1, told)
    if usage.drafted_tokens:
        parts.append(
            f"{usage.accepted_tokens} of {usage.drafted_tokens} drafts accepted, "
            f"{usage.tokens_per_pass:.2f} tokens a pass"
        )
    if usage.forced_tokens:
        parts.append(f"{usage.forced_tokens} of {usage.answer_tokens} tokens forced")
    if finish.thinking_cut in _CUTS:
        parts.append(_CUTS[finish.thinking_cut])
    if finish.reason in _ENDINGS:
        parts.append(_ENDINGS[finish.reason])
    return " | ".join(parts)


def _miss_text(usage: Usage) -> str:
    """Why much of a prompt had to be read that goes on like something that was read before; empty where it did not."""
    miss, new = usage.miss, usage.prompt_tokens - usage.cached_tokens
    if miss is None or min(miss.at, new) < MUCH:
        return ""
    if miss.reason == "evicted":
        return f"{miss.at - usage.cached_tokens} tokens read again, whose state had to make room"
    if miss.reason == "picture":
        return f"another picture from token {miss.at} on"
    return f"another text from token {miss.at} on: {brief(miss.given_text)} in place of {brief(miss.kept_text)}"


def show_reply(reply: Reply, ops: Ops[Any, Any], display: DisplayOptions, before: str = "") -> bool:
    """Print a reply as it comes, behind what it was made to begin with, then its figures; False if Ctrl-C ended it."""
    answer = page_on(sys.stdout, wrap=display.wrap, markdown=display.markdown)
    answer.write(before)
    page, finished = answer, True
    try:
        for piece in reply:
            if piece.channel == "thinking":
                if piece.text and page is answer:
                    answer.end("")
                    page = _thinking_page(display)
            elif piece.channel == "tool_call":  # shown when they are complete, see edgeq.cli.tools
                continue
            elif page is not answer:
                page.end("\n\n")
                page = answer
            page.write(piece.text)
    except KeyboardInterrupt:
        reply.close()
        finished = False
    finally:
        if page is not answer:
            page.end("\n")
        if before or reply.text or not reply.tool_calls:  # a call alone is no line
            answer.end("\n")
    if not display.quiet:
        say(usage_line(reply, ops), faint=True)
    _tell_forgotten(reply)
    return finished


def _thinking_page(display: DisplayOptions) -> Page:
    if display.thinking_hidden:
        if not display.quiet and sys.stderr.isatty():
            say("thinking ...", faint=True)
        return Hidden()
    return page_on(sys.stderr, wrap=display.wrap, style=dim)


def hear(reply: Reply, *, stream: bool = False, thinking: bool = True) -> bool:
    """Generate a reply, with `stream` printing every piece as a JSON object on a line of its own; False if Ctrl-C ended
    it.
    """
    finished = True
    try:
        for piece in reply:
            if stream and (thinking or piece.channel != "thinking"):
                show_json(piece._asdict())
    except KeyboardInterrupt:
        reply.close()
        finished = False
    _tell_forgotten(reply)
    return finished


def _tell_forgotten(reply: Reply) -> None:
    if reply.forgotten:
        turns = "turn was" if reply.forgotten == 1 else f"{reply.forgotten} turns were"
        warn(f"the oldest {turns} forgotten to make room: the context window was full")


def print_json(
    reply: Reply, tokenizer: Tokenizer | None, *, stream: bool = False, thinking: bool = True, **more: object
) -> None:
    """Print a reply, as far as it was generated, as a JSON object. stream: as in `hear`, which came before."""
    shown = reply_object(reply, tokenizer) | more
    if not thinking:
        del shown["thinking"]
    show_json({"done": True, **shown} if stream else shown)


def reply_object(reply: Reply, tokenizer: Tokenizer | None) -> dict[str, object]:
    """A finished reply as one JSON object, for programs."""
    finish, usage = reply.finish, reply.usage
    more: dict[str, object] = {}
    if reply.tool_calls:
        more["tool_calls"] = [call.message() for call in reply.tool_calls]
    if reply.malformed_calls:
        more["malformed_calls"] = [malformed._asdict() for malformed in reply.malformed_calls]
    if reply.logprobs:
        more["logprobs"] = [
            _token_object(token, found.logprob, tokenizer)
            | {"top_logprobs": [_token_object(*likely, tokenizer) for likely in found.top]}
            for token, found in reply.logprobs
        ]
    return {
        "text": reply.text,
        "thinking": reply.thinking,
        **more,
        "ids": reply.ids,
        "finish_reason": finish.reason.value,
        "thinking_cut": finish.thinking_cut.value if finish.thinking_cut else None,
        "usage": {
            **usage._asdict(),
            "miss": usage.miss and usage.miss._asdict(),
            "acceptance": usage.acceptance,
            "tokens_per_pass": usage.tokens_per_pass,
        },
    }


def _token_object(token: int, logprob: float, tokenizer: Tokenizer | None) -> dict[str, object]:
    """A token and its log probability, in the fields of OpenAI's interface; its bytes, which need not be text."""
    spelled = tokenizer.token_bytes(token) if tokenizer else b""
    return {"id": token, "token": spelled.decode(errors="replace"), "bytes": list(spelled), "logprob": logprob}
