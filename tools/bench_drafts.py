"""What drafting gains.

**At a given acceptance**, on a model with random weights, whose own head is never right. One that knows the truth
stands in: the head drafts as always and takes its time, and then each draft is replaced by the token that the model
will say, with probability p, or by a wrong one. Plain and drafted runs take turns, and the result is the median of
their quotients.

    python tools/bench_drafts.py /path/to/checkpoint -p 0.9,0.7,0 -t 2 -n 64 -r 5 [--draft auto|N] [--rows]

With --rows: what passes of 1 to 8 rows take (with all states kept), relative to one row.

**By the model's own head**, after pieces of a text (--text), or after its lines as messages of a chat (--chat), sampled
as by default:

    python tools/bench_drafts.py demo --chat questions.txt --draft 3 -n 64 -r 20 --vocabulary 64,256,2048

With --vocabulary, in both: for drafts that are chosen among so many of the first ids, and those in the context.
"""

from __future__ import annotations

import argparse
from collections import deque
from pathlib import Path
from statistics import median
from time import perf_counter

import numpy as np

import edgeq
import edgeq.engine
from edgeq.api import Model
from edgeq.engine import Feed
from edgeq.generate import Decoding, GenerationSettings, Tally, check_draft
from edgeq.session.context import Context
from edgeq.session.speculation import Speculation


def run(model: Model, prompt: list[int], count: int, draft: str | int, knows: float, truth: list[int], seed: int,
        ) -> tuple[float, list[int], Tally]:  # fmt: skip
    """Seconds of `count` tokens after the first, the tokens, and what the drafts came to."""
    speculation = model.language.speculation(model.engine, draft)
    if speculation is not None:
        force(speculation, prompt + truth, knows, seed)
    context = Context(model.engine, speculation=speculation)
    settings = GenerationSettings(temperature=0, max_tokens=count + 1, loop_guard=False)
    decoding = Decoding(prompt, model.language.sampler(settings), room=context.room, eos_ids=())
    tokens = context.tokens(decoding)
    next(tokens)
    started = perf_counter()
    deque(tokens, maxlen=0)
    return perf_counter() - started, list(decoding.reply_ids), decoding.tally


def force(speculation: Speculation, text: list[int], knows: float, seed: int) -> None:
    """Make its drafts those of `text` with the probability `knows`, and wrong else."""
    rng = np.random.default_rng(seed)

    def bend(place: int, drafts: list[int]) -> list[int]:
        told = text[place : place + len(drafts)]
        told += [0] * (len(drafts) - len(told))
        return [token if rng.random() < knows else (token + 1) % 1000 for token in told]

    speculation.bend = bend


def rows_table(model: Model, repetitions: int) -> None:
    """Passes of 1 to 8 rows behind a prompt, in turns."""
    _, state = model.forward(list(range(100, 228)), model.state())
    counts, seconds = (1, 2, 3, 4, 5, 8), {n: list[float]() for n in (1, 2, 3, 4, 5, 8)}
    for _ in range(repetitions):
        for n in counts:
            feed = Feed(state, np.arange(n, dtype=np.int32), keep=n - 1, rows=n)
            started = perf_counter()
            model.engine.run([feed])
            seconds[n].append(perf_counter() - started)
    one = median(seconds[1])
    print(
        "rows  " + "  ".join(f"{n}: {1e3 * median(seconds[n]):.2f} ms ({median(seconds[n]) / one:.2f})" for n in counts)
    )


def forced(model: Model, options: argparse.Namespace) -> None:
    """Rows of the table for the acceptances asked for."""
    draft = check_draft(options.draft)
    prompt = np.random.default_rng(1).integers(0, min(30000, model.vocab_size), 64).tolist()
    _, truth, _ = run(model, prompt, options.n, "off", 0, [], 0)
    for knows in map(float, options.p.split(",")):
        model.engine.pace = type(model.engine.pace)()
        run(model, prompt, options.n, draft, knows, truth, 99)  # loads the head, and learns what passes take
        gains, tallies = [], []
        for seed in range(options.r):
            plain, said, _ = run(model, prompt, options.n, "off", 0, truth, seed)
            drafted, same, tally = run(model, prompt, options.n, draft, knows, truth, seed)
            assert said == same == truth, "drafts changed the text"
            gains.append(plain / drafted)
            tallies.append(tally)
        per_pass = sum(t.accepted for t in tallies) / sum(t.passes for t in tallies) + 1
        drafts = sum(t.drafted for t in tallies) / sum(t.passes for t in tallies)
        print(
            f"knows {knows:.1f}  {median(gains):.3f}x plain ({min(gains):.2f} to {max(gains):.2f}), "
            f"{per_pass:.2f} tokens and {drafts:.2f} drafts a pass, plain {1e3 * plain / options.n:.2f} ms a token",
            flush=True,
        )


def by_its_head(model: Model, options: argparse.Namespace) -> None:
    """One row: replies to the pieces of a text, each without drafts and with them, by the head's own drafts."""
    draft, total, gains = check_draft(options.draft), Tally(), []
    for seed, prompt in enumerate(prompts(model, options)):
        settings = GenerationSettings(seed=seed, max_tokens=options.n, loop_guard=False)
        seconds, ids = {}, {}
        for way in ("off", draft):
            context = Context(model.engine, speculation=model.language.speculation(model.engine, way))
            decoding = Decoding(prompt, model.language.sampler(settings), room=context.room, eos_ids=model.eos_ids)
            tokens = context.tokens(decoding)
            next(tokens)
            started = perf_counter()
            deque(tokens, maxlen=0)
            seconds[way], ids[way] = perf_counter() - started, decoding.reply_ids
        assert ids["off"] == ids[draft], "drafts changed the text"
        if seed and len(ids["off"]) > 1:  # the first loads the head
            gains.append(seconds["off"] / seconds[draft])
        for field in ("passes", "drafted", "accepted"):
            setattr(total, field, getattr(total, field) + getattr(decoding.tally, field))
    print(
        f"{100 * total.accepted / max(1, total.drafted):.1f} % of {total.drafted} drafts accepted, "
        f"{total.tokens_per_pass:.3f} tokens a pass, {median(gains):.3f}x plain ({min(gains):.2f} to {max(gains):.2f})",
        flush=True,
    )


def prompts(model: Model, options: argparse.Namespace) -> list[list[int]]:
    if options.chat:
        lines = options.chat.read_text("utf-8").splitlines()[: options.r]
        return [list(model.prompt([{"role": "user", "content": line}], thinking=False).ids) for line in lines]
    ids = model.need_tokenizer().encode(options.text.read_text("utf-8"))
    step = max(1, (len(ids) - 64) // options.r)
    return [ids[i * step : i * step + 64] for i in range(options.r)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("-p", default="0.9,0.7,0", help="probabilities that a draft is right")
    parser.add_argument("-t", type=int, default=None, help="threads")
    parser.add_argument("-n", type=int, default=64, help="tokens of a run")
    parser.add_argument("-r", type=int, default=5, help="pairs of runs")
    parser.add_argument("--draft", default="auto")
    parser.add_argument("--rows", action="store_true")
    parser.add_argument("--text", type=Path, metavar="FILE")
    parser.add_argument("--chat", type=Path, metavar="FILE")
    parser.add_argument("--vocabulary", default="", metavar="N,...", help="first ids that are drafted")
    options = parser.parse_args()
    model = edgeq.load(options.model, backend="cpu", threads=options.t)
    if options.rows:
        rows_table(model, 9)
    measure = by_its_head if options.text or options.chat else forced
    if not options.vocabulary:
        measure(model, options)
    for size in map(int, filter(None, options.vocabulary.split(","))):
        setattr(edgeq.engine, "draft_prefix", lambda *_, size=size: size)  # noqa: B010
        print(f"{size} ids: ", end="")
        measure(model, options)


if __name__ == "__main__":
    main()
