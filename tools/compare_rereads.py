#!/usr/bin/env python3
"""Tokens of prompts that are read in a conversation with an edit and a restart: edgeq's and llama-server's.

    python tools/compare_rereads.py MODEL [histories] [chat]
    python tools/compare_rereads.py --server LLAMA_SERVER --gguf FILE.gguf [restart | slot]

Thirty turns; the 15th is changed; the program ends and begins again; a last turn. What is counted is what the engine
says: `timings.prompt_n` of llama-server, `usage` of edgeq. edgeq is asked by a program that sends the whole history
with every request (histories), and as one Chat that is saved and loaded (chat); llama-server with and without its slot
saved before the restart and restored after it. The weights may be random.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import edgeq  # noqa: E402

TURNS, EDITED, REPLY, PORT = 30, 15, 4, 8197
SYSTEM = "You are a careful assistant. " + "Answer in whole sentences, and say what you do not know. " * 12

Ask = Callable[[list[dict[str, str]]], tuple[str, int, int]]
"""Reply to a history: the text, the tokens of the prompt, and how many of them were read."""


def question(n: int) -> str:
    return f"Question {n}: what is there to say about number {n} and the numbers around it, and why does it matter?"


class Server:
    """llama-server with one slot."""

    def __init__(self, binary: Path, gguf: Path, slots: Path) -> None:
        self.process = subprocess.Popen(
            [binary, "-m", gguf, "-c", "8192", "-np", "1", "-t", "2", "--port", str(PORT), "--jinja",
             "--slot-save-path", slots, "--chat-template-kwargs", '{"enable_thinking": false}'],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        for _ in range(600):
            try:
                self.post("/health", None)
                return
            except OSError:
                time.sleep(0.5)
        raise SystemExit("llama-server does not start")

    def post(self, path: str, body: Any) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{PORT}{path}", data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=900) as answer:
            return json.loads(answer.read())

    def ask(self, messages: list[dict[str, str]]) -> tuple[str, int, int]:
        found = self.post(
            "/v1/chat/completions", {"messages": messages, "max_tokens": REPLY, "temperature": 0, "cache_prompt": True}
        )
        return (
            found["choices"][0]["message"]["content"] or "",
            found["usage"]["prompt_tokens"],
            found["timings"]["prompt_n"],
        )

    def slot(self, action: str) -> None:
        self.post(f"/slots/0?action={action}", {"filename": "slot.bin"})

    def close(self) -> None:
        self.process.terminate()
        self.process.wait()


def histories(model: edgeq.Model) -> Ask:
    """edgeq, given the whole history with every request."""

    def ask(messages: list[dict[str, str]]) -> tuple[str, int, int]:
        chat = model.chat(messages=messages, thinking=False, temperature=0, max_tokens=REPLY)
        reply = chat.answer()
        text = "".join(piece.text for piece in reply)
        return text, reply.usage.prompt_tokens, reply.usage.prompt_tokens - reply.usage.cached_tokens

    return ask


def conversation(model: edgeq.Model, session: Path) -> Ask:
    """edgeq's Chat, which is told what the history has become, and saved after every reply."""
    if session.exists():
        chat = edgeq.load_session(session, model)
    else:
        chat = model.chat(system=SYSTEM, thinking=False, temperature=0, max_tokens=REPLY)

    def ask(messages: list[dict[str, str]]) -> tuple[str, int, int]:
        reply = chat.answer(messages)
        text = "".join(piece.text for piece in reply)
        chat.save(session)
        return text, reply.usage.prompt_tokens, reply.usage.prompt_tokens - reply.usage.cached_tokens

    return ask


def talk(ask: Ask, restart: Callable[[], Ask]) -> dict[str, int]:
    """The conversation; tokens read by part of it, and those that its prompts had."""
    counts = dict.fromkeys(("tokens of all prompts", "turns 1 to 30", "the edit of turn 15", "after the restart"), 0)
    messages = [{"role": "system", "content": SYSTEM}]

    def turn(text: str, part: str) -> None:
        messages.append({"role": "user", "content": text})
        reply, total, read = ask(messages)
        messages.append({"role": "assistant", "content": reply})
        counts["tokens of all prompts"] += total
        counts[part] += read

    for n in range(1, TURNS + 1):
        turn(question(n), "turns 1 to 30")
    del messages[2 * EDITED - 1 :]
    turn(question(115), "the edit of turn 15")
    ask = restart()
    turn(question(16), "after the restart")
    return counts


def edgeqs(path: str, way: str) -> dict[str, int]:
    with tempfile.TemporaryDirectory() as folder:

        def start() -> Ask:
            model = edgeq.load(path)
            if way == "chat":
                return conversation(model, Path(folder, "session.eqs"))
            model.keep_prefixes(folder, "8G")
            return histories(model)

        return talk(start(), start)


def servers(binary: Path, gguf: Path, *, saved: bool) -> dict[str, int]:
    with tempfile.TemporaryDirectory() as folder:
        running = [Server(binary, gguf, Path(folder))]

        def again() -> Ask:
            if saved:
                running[-1].slot("save")
            running[-1].close()
            running.append(Server(binary, gguf, Path(folder)))
            if saved:
                running[-1].slot("restore")
            return running[-1].ask

        try:
            return talk(running[0].ask, again)
        finally:
            running[-1].close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", metavar="MODEL | WAY")
    parser.add_argument("--server", type=Path)
    parser.add_argument("--gguf", type=Path)
    given = parser.parse_args()
    for way in given.names if given.server else given.names[1:]:
        if given.server:
            counts = servers(given.server, given.gguf, saved=way == "slot")
        else:
            counts = edgeqs(given.names[0], way)
        print(
            f"| {'llama-server' if given.server else 'edgeq'}, {way} | " + " | ".join(f"{n:,}" for n in counts.values())
        )


if __name__ == "__main__":
    main()
