#!/usr/bin/env python3
"""What session files cost: time to save, to save a turn more, to open, to check, and bytes.

    python tools/measure_sessions.py MODEL [TOKENS ...]

The conversations are of random tokens with states of random numbers, so that nobody has to wait for the model to read
100,000 tokens; everything else is what `chat.save` and `edgeq.load_session` do.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import edgeq  # noqa: E402
from edgeq.api import Model  # noqa: E402
from edgeq.session.chat import Chat  # noqa: E402
from edgeq.session.files import SavedSession  # noqa: E402
from edgeq.session.prefixes import Prefix  # noqa: E402
from edgeq.session.turns import Turn  # noqa: E402
from edgeq.state import DeltaState, State  # noqa: E402
from edgeq.text.conversation import Generated  # noqa: E402


def random_state(model: Model, tokens: int) -> State[Any]:
    """A state of so many tokens."""
    c, rng, ops = model.config.text, np.random.default_rng(tokens), model.ops

    def layer(kind: str) -> Any:
        if kind == "linear_attention":
            heads = (c.linear_num_value_heads, c.linear_value_head_dim, c.linear_key_head_dim)
            parts = ((c.linear_conv_kernel_dim - 1, c.conv_dim), heads)
            return DeltaState(*(ops.array(rng.standard_normal(shape, np.float32)) for shape in parts))
        shape = (min(tokens, 4096), c.num_key_value_heads, c.head_dim)
        some = rng.standard_normal(shape, np.float32)
        cache = ops.kv_cache(some, some)
        while cache.length < tokens:
            more = some[: tokens - cache.length]
            cache = ops.append(ops.array(more), ops.array(more), cache)
        return cache

    layers = tuple(layer(kind) for kind in c.layer_types)
    return State(layers, tokens, tokens, model.engine.fingerprint)


def conversation(model: Model, tokens: int) -> Chat:
    """A conversation of one long reply."""
    chat = model.chat(max_tokens=8, temperature=0, draft="off", messages=[{"role": "user", "content": "?"}])
    prompt = tuple(chat.ids)
    ids = tuple(np.random.default_rng(tokens).integers(1000, 200_000, tokens - len(prompt)).tolist())
    found = chat.snapshot()
    (turn,) = found.turns
    reply = {"role": "assistant", "content": model.need_tokenizer().decode(ids)}
    turn = Turn(turn.said, turn.mark, turn.asked, reply)
    prefix = Prefix(np.array(prompt + ids, np.int32), (), random_state(model, tokens))
    entries = (*found.entries, Generated(prompt, ids))
    return Chat.of(model, found._replace(turns=[turn], entries=entries, prefixes=[prefix]))


def timed(call: Callable[[], Any]) -> float:
    started = perf_counter()
    call()
    return perf_counter() - started


def measure(model: Model, tokens: int, folder: Path) -> None:
    path, chat = folder / f"{tokens}.eqs", conversation(model, tokens)
    first = timed(lambda: chat.save(path))
    size = path.stat().st_size
    list(chat.send("and then?"))
    turn = timed(lambda: chat.save(path))
    added = path.stat().st_size - size
    model.prefixes.limit = 0
    model.prefixes.limit = 1 << 27
    opened = [timed(lambda: edgeq.load_session(path, model)) for _ in range(5)]
    checked = timed(SavedSession(path).check)
    print(
        f"{tokens:>8,} tokens: {size / 1e6:>8,.1f} MB, saved in {first:.3f} s; a turn more: {added / 1e6:.1f} MB, "
        f"{turn:.3f} s; opened in {median(opened):.3f} s, checked in {checked:.3f} s",
        flush=True,
    )
    path.unlink()


def main() -> None:
    name, *numbers = sys.argv[1:]
    model = edgeq.load(name, backend=os.environ.get("EDGEQ_BACKEND", "auto"))
    with tempfile.TemporaryDirectory() as folder:
        for tokens in map(int, numbers or ["1000", "30000", "100000"]):
            measure(model, tokens, Path(folder))


if __name__ == "__main__":
    main()
