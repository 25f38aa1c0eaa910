"""What the trainings of the miniature share: draws, order, learning rate, state and log, all functions of (seed, step)."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.miniature import models as miniature_models
from sdxl_ambient.training.state import load_tree, save_tree


@dataclass(frozen=True)
class TrainingRun:
    """What each of the two trainings is told.

    Attributes:
        work_dir: for states and logs. output_dir: the miniature's folder, whose data/ is read.
        steps: optimizer steps in all; batch_size: pictures in a step; learning_rate: at its peak.
        checkpointing_steps, logging_steps: steps from one checkpoint, or line of the log, to the next.
        seed: every draw follows from it and the step. device: "cpu" or "cuda".
    """

    work_dir: Path
    output_dir: Path
    steps: int
    batch_size: int
    learning_rate: float
    checkpointing_steps: int
    logging_steps: int
    seed: int
    device: str


def step_generator(seed: int, step: int) -> torch.Generator:
    """The generator of every draw in one training step."""
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


def batch_indices(count: int, batch_size: int, step: int, seed: int) -> torch.Tensor:
    """int64 tensor (batch_size,): this step's share of a permutation drawn once per epoch."""
    epoch, batch = divmod(step, count // batch_size)
    order = torch.randperm(count, generator=step_generator(seed + 1, epoch))
    return order[batch * batch_size : (batch + 1) * batch_size]


def learning_rate(peak: float, step: int, steps: int, warmup: int) -> float:
    """Linear warm-up, then half a cosine to zero."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def save_state(state: dict, path: Path) -> None:
    """Write a training state so that an interruption leaves either the old file or the new one."""
    temporary = path.with_suffix(".tmp")
    save_tree(temporary, state)
    temporary.replace(path)


def load_state(path: Path) -> dict | None:
    """A training state that save_state wrote, on the CPU, or None."""
    return load_tree(path) if path.exists() else None


class Log:
    """JSON lines in work_dir/{stage}_log.jsonl; lines of steps that a resumed run will repeat are dropped."""

    def __init__(self, path: Path, first_step: int):
        self.path = path
        lines = path.read_text().splitlines() if path.exists() else []
        kept = [line for line in lines if json.loads(line)["step"] <= first_step]
        path.write_text("".join(line + "\n" for line in kept))

    def __call__(self, **record) -> None:
        line = json.dumps({k: round(v, 6) if isinstance(v, float) else v for k, v in record.items()})
        print(line, flush=True)
        with self.path.open("a") as file:
            file.write(line + "\n")


def micro_conditioning(corners: torch.Tensor) -> torch.Tensor:
    """SDXL's time ids, float32 (n, 6), of crops with their upper left corners (n, 2) in pixels, x before y."""
    size = torch.full_like(corners, miniature_models.RESOLUTION)
    return torch.cat([size, corners.flip(-1), size], dim=-1).float()


def denoising_loss(unet, alphas_cumprod, latents, states, pooled, t, noise, time_ids=None) -> torch.Tensor:
    """Plain denoising loss of epsilon prediction; without time_ids (n, 6), of whole pictures.

    latents, noise: (n, 4, 16, 16); states: (n, 77, 80); pooled: (n, 48); t: (n,). Returns (n,).
    """
    abar = alphas_cumprod[t].view(-1, 1, 1, 1)
    x_t = abar.sqrt() * latents + (1 - abar).sqrt() * noise
    if time_ids is None:
        time_ids = micro_conditioning(torch.zeros(len(t), 2, dtype=torch.long, device=t.device))
    conditioning = {"text_embeds": pooled, "time_ids": time_ids}
    predicted = unet(x_t, t, states, added_cond_kwargs=conditioning).sample
    return (predicted - noise).square().mean((1, 2, 3))
