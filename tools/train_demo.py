#!/usr/bin/env python3
"""Train the demo model from generated data and write its checkpoint folder.

    tools/train_demo.py --work /tmp/demo-training --out edgeq/demo

Deterministic by --seed, resumable (run the same command again), exportable at any time (--export-only).
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch
from demo.architecture import DEMO
from demo.batches import sample_texts
from demo.export import export
from demo.seeing import teach
from demo.text import train_tokenizer
from demo.training import Plan, Trainer
from tokenizers import Tokenizer

TOWER_STEPS = 1500


def tokenizer(work: Path, seed: int) -> Tokenizer:
    path = work / "tokenizer.json"
    if not path.exists():
        train_tokenizer(sample_texts(seed, 12_000), DEMO).save(str(path))
    return Tokenizer.from_file(str(path))


def learn_to_see(trainer: Trainer, path: Path) -> None:
    """The tower's lesson, once per work folder."""
    tower = trainer.model.tower
    if not path.exists():
        right = teach(tower, trainer.plan.seed, TOWER_STEPS, trainer.device)
        print("tower, right of 2000: " + "  ".join(f"{k} {v:.4f}" for k, v in right.items()), file=sys.stderr)
        torch.save(tower.state_dict(), path)
    tower.load_state_dict(torch.load(path, map_location=trainer.device, weights_only=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for tokenizer and checkpoints")
    parser.add_argument("--out", type=Path, help="checkpoint folder to write at the end")
    parser.add_argument("--steps", type=int, default=7500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--eager", action="store_true", help="do not compile")
    parser.add_argument("--export-only", action="store_true", help="write --out from the last checkpoint and stop")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    tok = tokenizer(args.work, args.seed)
    trainer = Trainer(DEMO, Plan(args.steps, args.seed), tok, args.work, args.device, not args.eager)
    if not trainer.resume():
        learn_to_see(trainer, args.work / "tower.pt")
    if not args.export_only:
        trainer.run()
    if args.out:
        export(trainer.model, tok, args.out)


if __name__ == "__main__":
    main()
