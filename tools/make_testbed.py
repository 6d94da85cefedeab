#!/usr/bin/env python3
"""Train the test bed for quantization quality: the demo's data and trainer, about 30 M parameters, and an outlier twin.

    tools/make_testbed.py --work /tmp/testbed --out /tmp/testbed-model

Writes OUT and OUT-outliers: the same function, with 1 % of the channels rescaled by 8 or 16, as real checkpoints have.
Not shipped. See docs/development/demo-model.md for the training time.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
from demo.architecture import TESTBED
from demo.export import export
from demo.outliers import inject
from demo.training import Plan, Trainer
from train_demo import learn_to_see, tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for tokenizer and checkpoints")
    parser.add_argument(
        "--out", type=Path, required=True, help="checkpoint folder to write; its twin gets the suffix -outliers"
    )
    parser.add_argument("--steps", type=int, default=7500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--eager", action="store_true", help="do not compile")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    tok = tokenizer(args.work, args.seed)
    trainer = Trainer(TESTBED, Plan(args.steps, args.seed), tok, args.work, args.device, not args.eager)
    if not trainer.resume():
        learn_to_see(trainer, args.work / "tower.pt")
    trainer.run()
    model = trainer.model.cpu()
    export(model, tok, args.out)
    inject(model)
    export(model, tok, args.out.with_name(args.out.name + "-outliers"))


if __name__ == "__main__":
    main()
