#!/usr/bin/env python3
"""Write tests/data/histories.json.gz: what transformers' apply_chat_template makes of given histories.

tools/make_history_fixtures.py            needs transformers 5.23

With the demo model's template, which is that of the 0.8B and the 2B, and with that of the 4B, which thinks unless told
otherwise. Each case has the messages, options, and the text, or None where the template refuses the messages.
"""

from __future__ import annotations

import gzip
import itertools
import json
from pathlib import Path
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

ROOT = Path(__file__).parent.parent
SMALL = (ROOT / "edgeq" / "demo" / "chat_template.jinja").read_text()
ON, OFF = "'<think>\\n'", "'<think>\\n\\n</think>\\n\\n'"
START = SMALL.rindex("    {%- if enable_thinking")
LARGE = SMALL[:START] + SMALL[START:].replace("is true", "is false").replace(ON, "ON").replace(OFF, ON).replace(
    "ON", OFF
)

TOOL = {
    "type": "function",
    "function": {"name": "look", "parameters": {"type": "object", "properties": {"at": {"type": "string"}}}},
}


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: Any, **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **fields}


def tool(content: Any, name: str = "a") -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": name, "content": content}


def call(name: str = "a", **arguments: Any) -> dict[str, Any]:
    return {"id": name, "type": "function", "function": {"name": "look", "arguments": arguments}}


def system(content: Any) -> dict[str, Any]:
    return {"role": "system", "content": content}


PARTS = [{"type": "text", "text": " one\n"}, {"type": "text", "text": "two "}]
LOOKING = assistant("Let me see.", tool_calls=[call(at="top")], reasoning_content="I should look.")
TWICE = assistant(None, tool_calls=[call("a", at="top", n=3, deep={"x": [1, None, "ü"]}, yes=True), call("b")])
HISTORIES: dict[str, list[dict[str, Any]]] = {
    "a question": [user("hello")],
    "white space": [system("  be kind\n\n"), user("\n hello \n\n"), assistant(" hi\n"), user(" ")],
    "parts": [system(PARTS), user(PARTS), assistant(PARTS), user([{"type": "text", "text": "?"}])],
    "thinking of an earlier turn": [user("1"), assistant("a", reasoning_content="hm\n"), user("2")],
    "thinking of the last turn": [user("1"), assistant("a"), user("2"), assistant("b", reasoning_content=" hm ")],
    "thinking in text": [user("1"), assistant("<think>\nhm\n</think>\n\na"), user("2"), assistant("<think>x</think>b")],
    "a call": [user("where?"), LOOKING],
    "a result": [user("where?"), LOOKING, tool("there")],
    "a result and more": [system("s"), user("where?"), LOOKING, tool("there"), assistant("There."), user("sure?")],
    "two calls": [user("where?"), TWICE, tool(PARTS, "b"), tool("x\ny")],
    "calls after calls": [user("where?"), LOOKING, tool("no"), TWICE, tool("yes"), tool("", "b"), assistant("There.")],
    "question after results": [user("where?"), TWICE, tool("1"), tool("2", "b"), user("well?")],
    "two users": [user("1"), user("2"), assistant("a"), user("3"), user("4")],
    "two assistants": [user("1"), assistant("a"), assistant("b"), user("2")],
    "a greeting": [system("s"), assistant("Welcome!"), user("1")],
    "several systems": [system("s"), system("t"), user("1")],
    "a late system": [user("1"), assistant("a"), system("s"), user("2")],
    "an unknown role": [{"role": "developer", "content": "s"}, user("1")],
    "no question": [system("s"), assistant("Welcome!")],
    "long": [m for n in range(6) for m in (user(f"question {n}"), assistant(f"answer {n}", reasoning_content=f"{n}?"))],
    "named": [{"role": "user", "name": "anna", "content": "1"}, assistant("a", refusal=None), user("2")],
}  # fmt: skip


def rendered(template: str, messages: list[dict[str, Any]], **options: Any) -> str | None:
    try:
        (text,), _ = render_jinja_template([messages], chat_template=template, **options)
    except Exception:
        return None
    return str(text)


def main() -> None:
    made: dict[str, Any] = {"large": LARGE, "cases": []}
    for (name, messages), large, tools in itertools.product(HISTORIES.items(), (False, True), (False, True)):
        template, awaited = LARGE if large else SMALL, messages[-1]["role"] != "assistant"
        for thinking in (None, True, False) if awaited else (None,):
            options: dict[str, Any] = {} if thinking is None else {"enable_thinking": thinking}
            options |= {"tools": [TOOL]} if tools else {}
            texts = {"text": rendered(template, messages, add_generation_prompt=awaited, **options)}
            if not awaited and isinstance(messages[-1]["content"], str) and "tool_calls" not in messages[-1]:
                texts["going on"] = rendered(template, messages, continue_final_message=True, **options)
            made["cases"].append(
                {"name": name, "large": large, "tools": tools, "thinking": thinking, "messages": messages, **texts}
            )
    packed = gzip.compress(json.dumps(made, ensure_ascii=False).encode(), mtime=0)
    (ROOT / "tests" / "data" / "histories.json.gz").write_bytes(packed)


if __name__ == "__main__":
    main()
