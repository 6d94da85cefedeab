#!/usr/bin/env python3
"""Score every skill of the demo model on held-out generated cases and print a table.

tools/eval_demo.py                                   the shipped folder, by transformers
tools/eval_demo.py --backend cpu --model OUT         a quantized folder, by edgeq
tools/eval_demo.py --backend cpu --draft 3           how many drafts of the MTP head are right, skill by skill
tools/eval_demo.py --only sum --show-wrong 5
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from demo.evaluation import Runner, Score, score, tasks
from demo.runners import EdgeqRunner, TransformersRunner
from tokenizers import Tokenizer

DEMO = Path(__file__).parent.parent / "edgeq" / "demo"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=DEMO)
    parser.add_argument(
        "--backend", default="transformers", help="transformers, or a backend of edgeq: numpy, cpu, mlx"
    )
    parser.add_argument("--draft", default=None, help="how edgeq drafts: off, auto, mtp, ngram or a number a pass")
    parser.add_argument("--cases", type=int, default=100, help="cases per row")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument("--show-wrong", type=int, default=0, metavar="N", help="print up to N wrong answers per row")
    parser.add_argument("--json", action="store_true", help="one JSON line per row instead of the table")
    args = parser.parse_args()
    tok = Tokenizer.from_file(str(args.model / "tokenizer.json"))
    run: Runner = (
        TransformersRunner(args.model)
        if args.backend == "transformers"
        else EdgeqRunner(args.model, args.backend, args.draft or "auto")
    )
    for task in tasks(lambda text: len(tok.encode(text, add_special_tokens=False).ids)):
        if args.only in task.name and (run.sees or not task.visual):
            cases = min(args.cases, 20) if task.name.startswith("recall at") and not args.only else args.cases
            show(score(task, run, tok, cases, args.seed), args.json, args.show_wrong)
            if args.draft and isinstance(run, EdgeqRunner):
                show_drafts(run)


def show_drafts(run: EdgeqRunner) -> None:
    """What the drafts of a row came to."""
    tally, run.tally = run.tally, type(run.tally)()
    share = f"{100 * tally.accepted / tally.drafted:5.1f} %" if tally.drafted else "  none"
    print(f"{'':26} {share} of {tally.drafted} drafts accepted, {tally.tokens_per_pass:.2f} tokens a pass", flush=True)


def show(s: Score, as_json: bool, wrong: int) -> None:
    mode = "thinking" if s.task.thinking else "direct"
    if as_json:
        line = json.dumps({"skill": s.task.name, "mode": mode, "right": s.right, "cases": s.cases})
    else:
        line = f"{s.task.name:16} {mode:9} {100 * s.right / s.cases:5.1f} %  of {s.cases}"
    print(line, flush=True)
    for prompt, said in s.wrong[:wrong]:
        print(f"    {prompt!r} -> {said!r}", file=sys.stderr)


if __name__ == "__main__":
    main()
