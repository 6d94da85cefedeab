"""The training loop: one process, checkpoints that resume exactly, export at any time."""

from __future__ import annotations

import math
import multiprocessing
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional as F

from . import pictures
from .architecture import Shape
from .batches import Batch, make_batch
from .model import Model

MTP_ROWS = 4  # one row in four also trains the MTP head
EAGER = ("middle", "long", "longer")  # rare long shapes are not worth compiling


@dataclass(frozen=True)
class Plan:
    """How long and how fast to learn: warm-up, constant, then decay to zero over the last `decay` of all steps."""

    steps: int
    seed: int = 0
    muon_rate: float = 0.02
    adam_rate: float = 2e-3
    warmup: int = 100
    decay: float = 0.45

    def factor(self, step: int) -> float:
        left = (self.steps - step) / (self.decay * self.steps)
        return min((step + 1) / self.warmup, 1.0, left)


def text_loss(
    model: Model, x: Tensor, ids: Tensor, weights: Tensor, rope: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Weighted cross-entropy of the next token, and of the token after it by the MTP head (trunk detached).

    `x` [B, T, hidden] embeds ids[:, :-1]; `ids` and `weights` are [B, T + 1].
    """
    with torch.autocast(x.device.type, torch.bfloat16):
        hidden = model.text(x, rope)
        head = model.text.embed_tokens.weight
        loss = weighted(hidden, head, ids[:, 1:], weights[:, 1:])
        rows = max(1, len(ids) // MTP_ROWS)
        cos, sin = rope
        draft = model.mtp(x[:rows, 1:].detach(), hidden[:rows, :-1].detach(), (cos[:rows, 1:], sin[:rows, 1:]))
        draft_loss = weighted(draft, head.detach(), ids[:rows, 2:], weights[:rows, 2:])
    return loss, draft_loss


def weighted(hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Mean cross-entropy; logits are computed only where there is a weight."""
    chosen = weights > 0
    losses = F.cross_entropy(F.linear(hidden[chosen], head).float(), targets[chosen], reduction="none")
    return (losses * weights[chosen]).sum() / weights.sum().clamp_min(1)


def optimizers(model: nn.Module, plan: Plan) -> list[torch.optim.Optimizer]:
    """Muon (Jordan 2024) for the matrices inside layers, AdamW for embeddings, norms, convolutions and vectors."""
    matrices, gains, rest = list[Tensor](), list[Tensor](), list[Tensor]()
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        inside = any(part in name for part in ("layers.", "mtp.fc"))
        if p.ndim == 2 and inside and min(p.shape) >= 32:
            matrices.append(p)
        else:
            (gains if p.ndim < 2 else rest).append(p)
    groups = [{"params": rest, "weight_decay": 0.01}, {"params": gains, "weight_decay": 0.0}]
    return [
        torch.optim.Muon(matrices, lr=plan.muon_rate, weight_decay=0.01, momentum=0.95, adjust_lr_fn="original"),
        torch.optim.AdamW(groups, lr=plan.adam_rate, betas=(0.9, 0.98), fused=True),
    ]


def prepared(seed: int, first: int, last: int, tok: Tokenizer, s: Shape) -> Iterator[Batch]:
    """The batches of steps first .. last - 1, the next one made by another process while this one is learnt."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    maker = context.Process(target=send_batches, args=(there, seed, first, last, tok, s), daemon=True)
    maker.start()
    there.close()
    for _ in range(first, last):
        yield here.recv()
    maker.join()


def send_batches(pipe: Connection, seed: int, first: int, last: int, tok: Tokenizer, s: Shape) -> None:
    with suppress(BrokenPipeError):  # the trainer has gone
        for step in range(first, last):
            pipe.send(make_batch(seed, step, tok, s))


class Trainer:
    def __init__(
        self, s: Shape, plan: Plan, tok: Tokenizer, folder: Path, device: str = "cpu", compiled: bool = True
    ) -> None:
        self.s, self.plan, self.tok, self.folder, self.device = s, plan, tok, folder, device
        self.model = Model(s, plan.seed).to(device)
        self.model.tower.requires_grad_(False)
        self.optimizers = optimizers(self.model, plan)
        self.rates = [[g["lr"] for g in o.param_groups] for o in self.optimizers]
        self.step = 0
        if compiled:
            torch._dynamo.config.recompile_limit = 64  # one graph per kind of layer and shape of batch
            for layer in [*self.model.text.layers, *self.model.mtp.layers]:
                layer.compile(dynamic=False)

    def losses(self, batch: Batch) -> tuple[Tensor, Tensor]:
        patches = pictures.patches(batch.images)
        ids, weights, positions, patches = (
            torch.from_numpy(a).to(self.device) for a in (batch.ids, batch.weights, batch.positions, patches)
        )
        x = self.model.embed(ids[:, :-1], patches)
        rope = self.model.text.rope(positions[:, :, :-1])
        with torch.compiler.set_stance("force_eager" if batch.kind in EAGER else "default"):
            return text_loss(self.model, x, ids, weights, rope)

    def advance(self, batch: Batch) -> tuple[str, int, float, float]:
        """One step; (kind, tokens, loss, draft loss)."""
        loss, draft = self.losses(batch)
        (loss + draft).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        factor = self.plan.factor(self.step)
        for optimizer, rates in zip(self.optimizers, self.rates, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return batch.kind, batch.ids.size, loss.item(), draft.item()

    def save(self) -> None:
        """Checkpoint for resuming, written beside and renamed, so that it is never half there."""
        state = {
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizers": [o.state_dict() for o in self.optimizers],
        }
        temporary = self.folder / "checkpoint.tmp"
        torch.save(state, temporary)
        temporary.replace(self.folder / "checkpoint.pt")

    def resume(self) -> bool:
        path = self.folder / "checkpoint.pt"
        if not path.exists():
            return False
        state = torch.load(path, map_location=self.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step = state["step"]
        return True

    def run(self, save_every: float = 180, report_every: float = 15) -> None:
        """Train to the end of the plan; progress to stderr, a line per `report_every` seconds."""
        saved = reported = time.monotonic()
        tokens, seen = 0, dict[str, list[tuple[float, float]]]()
        for batch in prepared(self.plan.seed, self.step, self.plan.steps, self.tok, self.s):
            kind, count, loss, draft = self.advance(batch)
            tokens += count
            seen.setdefault(kind, []).append((loss, draft))
            now = time.monotonic()
            if now - reported > report_every:
                self.report(seen, tokens / (now - reported))
                reported, tokens, seen = now, 0, {}
            if now - saved > save_every:
                self.save()
                saved = time.monotonic()
        self.save()

    def report(self, seen: dict[str, list[tuple[float, float]]], rate: float) -> None:
        means = {k: [math.fsum(x) / len(x) for x in zip(*v, strict=True)] for k, v in sorted(seen.items())}
        parts = "  ".join(f"{k} {a:.3f}/{b:.3f}" for k, (a, b) in means.items())
        print(f"{self.step}/{self.plan.steps} {rate:.0f} tok/s  {parts}", file=sys.stderr, flush=True)
