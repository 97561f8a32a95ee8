"""Stage 2: the student learns to predict the teacher's tokens."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from tools.embedded_backbone.encoding import normalise
from tools.embedded_backbone.features import read_features
from tools.embedded_backbone.packages import Bytes
from tools.embedded_backbone.student import Student


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How long and how fast the student learns; ``views`` counts the distinct views of one epoch."""

    views: int
    epochs: int
    cool_down: int
    batch: int
    peak_rate: float
    decay: float
    seed: int


def distil(features: Path, work: Path, schedule: Schedule) -> VisionTransformer:
    """Train the student, keeping a checkpoint after each epoch and going on from the last one."""
    checkpoint = work / f"student-{describe(schedule)}.pt"
    torch.manual_seed(schedule.seed)
    student = Student()
    optimizer = build_optimizer(student, schedule)
    first = 0
    if checkpoint.exists():
        kept = torch.load(checkpoint, weights_only=True)
        student.load_state_dict(kept["student"])
        optimizer.load_state_dict(kept["optimizer"])
        first = kept["epoch"]
    if first < schedule.epochs:
        measure = torch.compile(student.measure_loss)
        data = read_features(features, schedule.views)
        for epoch in range(first, schedule.epochs):
            loss = train_epoch(measure, student, optimizer, data, schedule, epoch)
            torch.save(
                {"student": student.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch + 1},
                checkpoint,
            )
            print(f"epoch {epoch + 1}/{schedule.epochs}: loss {loss:.4f}", flush=True)
    return student.backbone.eval()


def train_epoch(
    measure: Callable[[Tensor, Tensor, Tensor], Tensor],
    student: Student,
    optimizer: torch.optim.Optimizer,
    data: tuple[Bytes, Tensor, Tensor],
    schedule: Schedule,
    epoch: int,
) -> float:
    """Show every view once, in an order and with mirrorings that only seed and epoch decide; return the loss."""
    small, token_targets, patch_targets = data
    generator = torch.Generator().manual_seed(schedule.seed * 1000 + epoch)
    rounds = torch.split(torch.randperm(len(small), generator=generator), schedule.batch)
    rounds = rounds[: len(small) // schedule.batch]
    total = 0.0
    for step, rows in enumerate(rounds):
        set_rate(optimizer, schedule, epoch + step / len(rounds))
        chosen = torch.rand(len(rows), generator=generator) < 0.5
        images = normalise(small[rows.numpy()], (0.5,) * 3, (0.5,) * 3)
        images, patches = mirror(images, patch_targets[rows].float(), chosen)
        with torch.autocast("cpu", torch.bfloat16):
            loss = measure(images, token_targets[rows], patches)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        total += float(loss.detach())
    return total / len(rounds)


def mirror(images: Tensor, patches: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Mirror the chosen rows of images (B, 3, 64, 64) and of their patch tokens (B, 64, D) alike."""
    grid = patches.reshape(len(patches), 8, 8, -1).flip(2).flatten(1, 2)
    return (
        torch.where(chosen[:, None, None, None], images.flip(3), images),
        torch.where(chosen[:, None, None], grid, patches),
    )


def set_rate(optimizer: torch.optim.Optimizer, schedule: Schedule, epoch: float) -> None:
    """Warm up linearly, follow a half cosine, and cool down linearly to zero over the last epochs.

    The cosine would end ``cool_down`` epochs after the last one: the ramp, not the cosine, ends the training.
    """
    horizon = schedule.epochs + schedule.cool_down
    warm = min(1.0, epoch / horizon / 0.05)
    cool = min(1.0, (schedule.epochs - epoch) / schedule.cool_down) if schedule.cool_down else 1.0
    rate = schedule.peak_rate * warm * cool * 0.5 * (1 + math.cos(math.pi * epoch / horizon))
    for group in optimizer.param_groups:
        group["lr"] = rate


def build_optimizer(student: Student, schedule: Schedule) -> torch.optim.AdamW:
    """AdamW whose weight decay spares biases, norms, the class token and the position table."""
    decayed = [p for name, p in student.named_parameters() if p.ndim > 1 and "token" not in name.split(".")[-1]]
    kept = {id(p) for p in decayed}
    spared = [p for p in student.parameters() if id(p) not in kept]
    groups = [{"params": decayed, "weight_decay": schedule.decay}, {"params": spared, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=schedule.peak_rate, betas=(0.9, 0.98))


def describe(schedule: Schedule) -> str:
    """Name a schedule for the cache: changing any of its numbers starts afresh."""
    digest = hashlib.sha256(repr(schedule).encode()).hexdigest()[:8]
    return f"{schedule.views}x{schedule.epochs}-{digest}"
