"""What `edgeq fit` says against what happens: peak memory, and tokens a second.

    python tools/check_fit.py memory FOLDER     # of checkpoints: q4_0.8b, q8_0.8b, 0.8b, q4_2b, ...
    python tools/check_fit.py speed FOLDER [WORD]    # only settings with the word in them

A setting is a process of its own. Memory: a conversation whose first question fills the context, and another turn.
Speed: the machine is measured and the model runs, three times in turns, because what other programs leave of it changes
within minutes; medians count. A prompt's time is that of all of it, generation's the median of a token's. Prints
Markdown.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent


class Setting(NamedTuple):
    """A checkpoint by its folder's name, KV bits, tokens of context, and an image's width and height."""

    name: str
    kv_bits: int | None
    context: int
    image: tuple[int, int] | None = None

    def __str__(self) -> str:
        picture = f", image of {self.image[0]} x {self.image[1]}" if self.image else ""
        return f"{self.name}, {self.context:,} tokens, {self.kv_bits or 16}-bit KV cache{picture}"


MEMORY = (
    Setting("q4_0.8b", None, 1024), Setting("q4_0.8b", None, 4096), Setting("q4_0.8b", 4, 8192),
    Setting("q8_0.8b", 8, 2048), Setting("0.8b", None, 1024), Setting("q4_2b", None, 2048), Setting("q4_2b", 4, 4096),
    Setting("q8_2b", 8, 1024), Setting("2b", None, 1024), Setting("q4_4b", None, 1024), Setting("q8_4b", 8, 1024),
    Setting("q4_0.8b", None, 2048, (1024, 1024)), Setting("q4_2b", None, 2048, (1024, 768)),
)  # fmt: skip
SPEED = (
    Setting("q4_0.8b", None, 512), Setting("q4_0.8b", None, 4096), Setting("q4_0.8b", 4, 16384),
    Setting("q8_0.8b", None, 512), Setting("q8_0.8b", 8, 4096), Setting("0.8b", None, 512),
    Setting("q4_2b", None, 512), Setting("q4_2b", 8, 4096), Setting("q8_2b", 8, 512), Setting("2b", None, 512),
    Setting("q4_4b", None, 512), Setting("q8_4b", None, 512),
)  # fmt: skip

PEAK = """
import json, sys
import numpy as np
from edgeq.api import load
from edgeq.fit import Variant, Wanted, picture_grids

path, kv_bits, context, image = json.loads(sys.argv[1])
model = load(path, backend="cpu", kv_bits=kv_bits)
grids, tokens = picture_grids(model.config, [tuple(image)] if image else [])
pixels = [np.random.default_rng(0).integers(0, 256, (image[1], image[0], 3), np.uint8)] if image else []
tokenizer = model.need_tokenizer()
text = tokenizer.decode(tokenizer.encode(" a b c d e f g h" * (context // 8))[: context - tokens - 60])
chat = model.chat(max_tokens=4, temperature=0.0)
for question, images in ((text, pixels), ("And?", [])):
    for _ in chat.send(question, images=images):
        pass
fit = Wanted(lambda _: model.ops, images=[tuple(image)] if image else []).of(Variant(model.checkpoint, 0), context)
peak = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps([peak, fit.plan.total]))
"""

RATES = """
import json, sys
from statistics import median
from time import perf_counter
from edgeq.api import load
from edgeq.machine.facts import keep_facts
from edgeq.machine.measure import measure_machine
from edgeq.machine.speed import expected_speed

def seconds(ids):
    global state
    started = perf_counter()
    _, state = model.forward(ids, state)
    return perf_counter() - started

path, kv_bits, context, _ = json.loads(sys.argv[1])
model, found, expected = None, [], []
for _ in range(3):
    facts = measure_machine()
    if model is None:
        keep_facts(facts)
        model = load(path, backend="cpu", kv_bits=kv_bits)
        model.forward(list(range(32)))
    state = model.state()
    prompt = seconds([7 * i % model.vocab_size for i in range(context)])
    found.append((context / prompt, 1 / median([seconds([i]) for i in range(48)][8:])))
    expected.append(expected_speed(model.checkpoint, model.ops, facts, context))
print(json.dumps([[median(rates), median(guesses)] for rates, guesses in zip(zip(*found), zip(*expected))]))
"""


def measured(code: str, folder: Path, setting: Setting) -> Any:
    """What a process prints that runs `code` with a setting."""
    name, kv_bits, context, image = setting
    with tempfile.TemporaryDirectory() as cache:
        done = subprocess.run(
            [sys.executable, "-P", "-c", code, json.dumps([str(folder / name), kv_bits, context, image])],
            env={**os.environ, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": cache}, capture_output=True, text=True,
            check=True, timeout=1800,
        )  # fmt: skip
    return json.loads(done.stdout)


def main(kind: str, folder: str, word: str = "") -> None:
    """Print a table."""
    if kind == "memory":
        print("| | predicted, MB | measured | |\n|---|---:|---:|---:|")
        for setting in (s for s in MEMORY if word in str(s)):
            peak, predicted = measured(PEAK, Path(folder), setting)
            cells = f"{predicted / 1e6:,.0f} | {peak / 1e6:,.0f} | {predicted / peak - 1:+.1%}"
            print(f"| {setting} | {cells} |", flush=True)
        return
    print("| | prompt, tokens/s: predicted | measured | | generation: predicted | measured | |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for setting in (s for s in SPEED if word in str(s)):
        both = [
            f"{expected:,.1f} | {found:,.1f} | {expected / found - 1:+.0%}"
            for found, expected in measured(RATES, Path(folder), setting)
        ]
        print(f"| {setting} | {' | '.join(both)} |", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
