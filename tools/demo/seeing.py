"""The vision tower's own lesson, before the language model looks: what lies where, how many, which number.

Through the few answer tokens of the language model the tower learns next to nothing. Here small linear heads, thrown
away afterwards, ask every merged token for the figure centred in it, and their mean for the count and the digits.
What a linear head can read, the language model can learn to read; in its training the tower stays as it is.
"""

from __future__ import annotations

import sys
import time
from random import Random

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import pictures
from .model import Vision

PICTURES = 128  # per step
MUON_RATE, ADAM_RATE, WARMUP, DECAY = 0.02, 2e-3, 50, 0.5
FEATURE_SCALE = 0.25  # root mean square of the features at the end, near that of the embeddings of text
NONE = 10  # the digit of a place that is empty


class Heads(nn.Module):
    """Linear readings of the features [N, 9, hidden]; a target below is one of their classes, per token or picture."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.shape = nn.Linear(hidden, 1 + len(pictures.SHAPES))
        self.colour = nn.Linear(hidden, 1 + len(pictures.COLOURS))
        self.count, self.tens, self.ones = (nn.Linear(hidden, n) for n in (5, 11, 11))

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        whole = features.mean(1)
        out = {name: getattr(self, name)(features) for name in ("shape", "colour")}
        return out | {name: getattr(self, name)(whole) for name in ("count", "tens", "ones")}


def lesson(rng: Random, count: int) -> tuple[np.ndarray, dict[str, Tensor]]:
    """Patches of `count` pictures, half of them printed numbers, and the targets: [N, 9] or [N]."""
    images = []
    targets = {"shape": np.zeros((count, pictures.MERGED), np.int64), "count": np.zeros(count, np.int64)}
    targets |= {"colour": np.zeros_like(targets["shape"])} | {k: np.full(count, NONE) for k in ("tens", "ones")}
    colours = list(pictures.COLOURS)
    for i in range(count):
        if rng.random() < 0.5:
            number = rng.randrange(100)
            images.append(pictures.printed(rng, str(number)))
            targets["tens"][i], targets["ones"][i] = number // 10 or NONE, number % 10
            continue
        places = rng.sample(list(pictures.PLACES), rng.choice((1, 1, 2, 3, 4)))
        figures = [pictures.figure(rng, place) for place in places]
        images.append(pictures.paint(figures, pictures.background(rng)))
        targets["count"][i] = len(figures)
        for f in figures:
            x, y = pictures.PLACES[f.place]
            token = y // 32 * (pictures.SIZE // 32) + x // 32
            targets["shape"][i, token] = 1 + pictures.SHAPES.index(f.shape)
            targets["colour"][i, token] = 1 + colours.index(f.colour)
    pixels = np.stack([np.asarray(image) for image in images])
    return pictures.patches(pixels), {k: torch.from_numpy(v) for k, v in targets.items()}


def teach(tower: Vision, seed: int, steps: int, device: str) -> dict[str, float]:
    """Train the tower in place and freeze it; returns the share of right readings of pictures that it has not seen."""
    torch.manual_seed(seed)
    tower.requires_grad_(True)
    heads = Heads(tower.s.hidden).to(device)
    chosen = {n: p.ndim == 2 and not n.startswith("pos_embed") for n, p in tower.named_parameters()}
    matrices = [p for n, p in tower.named_parameters() if chosen[n]]
    rest = [p for n, p in tower.named_parameters() if not chosen[n]] + list(heads.parameters())
    optimizers = [
        torch.optim.Muon(matrices, lr=MUON_RATE, weight_decay=0.01, momentum=0.95, adjust_lr_fn="original"),
        torch.optim.AdamW(rest, lr=ADAM_RATE, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]
    begun = time.monotonic()
    for step in range(steps):
        factor = min((step + 1) / WARMUP, 1.0, (steps - step) / (DECAY * steps))
        patches, targets = lesson(Random(f"{seed}/seeing/{step}"), PICTURES)
        readings = heads(tower(torch.from_numpy(patches).to(device), (6, 6)))
        losses = [
            F.cross_entropy(readings[k].flatten(0, -2), t.to(device).flatten()) * (3 if t.ndim == 2 else 1)
            for k, t in targets.items()
        ]
        torch.stack(losses).sum().backward()
        for optimizer, rate in zip(optimizers, (MUON_RATE, ADAM_RATE), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if step % 100 == 99:
            spent = time.monotonic() - begun
            print(f"tower {step + 1}/{steps} {spent:.0f} s  {sum(losses).item():.3f}", file=sys.stderr, flush=True)
    tower.requires_grad_(False)
    shares: dict[str, float] = settle(tower, heads, seed, device)
    return shares


@torch.no_grad()
def settle(tower: Vision, heads: Heads, seed: int, device: str) -> dict[str, float]:
    """Score the readings of 2000 new pictures, then bring the features to the scale of the text."""
    patches, targets = lesson(Random(f"{seed}/seeing/held out"), 2000)
    features = tower(torch.from_numpy(patches).to(device), (6, 6))
    right = {k: (heads(features)[k].argmax(-1).cpu() == t).float().mean().item() for k, t in targets.items()}
    factor = FEATURE_SCALE / features.square().mean().sqrt()
    last = tower.merger["linear_fc2"]
    last.weight *= factor
    last.bias *= factor
    return right
