"""Training of the miniature's VAE, and what is done with it."""

from __future__ import annotations

import time
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from benchmarks.miniature import data as miniature_data
from benchmarks.miniature import models as miniature_models
from benchmarks.miniature.training import (
    Log,
    TrainingRun,
    batch_indices,
    learning_rate,
    load_state,
    save_state,
    step_generator,
)

STATE_FILE = "vae.safetensors"


def gradient_l1(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """L1 distance of the horizontal and vertical differences of two image batches (n, c, h, w): keeps edges sharp."""
    d = a - b
    return d.diff(dim=-1).abs().mean() + d.diff(dim=-2).abs().mean()


def to_unit(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 pixels (n, 3, h, w) => float32 in [-1, 1]."""
    return pixels.float() / 127.5 - 1


@torch.no_grad()
def encode(vae, pixels: torch.Tensor) -> torch.Tensor:
    """uint8 pixels (n, 3, 64, 64) => mean latents (n, 4, 16, 16), not yet scaled."""
    batches = (to_unit(batch.to(vae.device)) for batch in pixels.split(64))
    return torch.cat([vae.encode(batch).latent_dist.mode() for batch in batches])


@torch.no_grad()
def psnr(vae, pixels: torch.Tensor) -> float:
    """Mean peak signal-to-noise ratio, in dB, of the reconstructions of uint8 pixels (n, 3, 64, 64)."""
    restored = torch.cat([vae.decode(z).sample for z in encode(vae, pixels).split(64)]).clamp(-1, 1)
    error = ((restored.cpu() - to_unit(pixels)) / 2).square().mean((1, 2, 3))
    return (-10 * error.log10()).mean().item()


def reconstruction_loss(vae, x: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """L1 distances of pictures x (n, 3, 64, 64) in [-1, 1] to their reconstructions from noisy latents, and the KL term."""
    with torch.autocast(x.device.type, torch.bfloat16):
        posterior = vae.encode(x).latent_dist
        restored = vae.decode(posterior.mean + posterior.std * noise).sample.float()
    return F.l1_loss(restored, x) + gradient_l1(restored, x) + 1e-6 * posterior.kl().float().mean()


def train_vae(run: TrainingRun) -> None:
    """Train as far as ``run.steps``, from work_dir/vae.pt where it is there; log and checkpoint on the way."""
    _, pixels = miniature_data.read_imagefolder(run.output_dir / "data" / "pretrain")
    _, heldout = miniature_data.read_imagefolder(run.output_dir / "data" / "heldout")
    torch.manual_seed(run.seed)
    vae = AutoencoderKL.to(miniature_models.build_vae(), run.device)
    optimizer = torch.optim.AdamW(vae.parameters(), betas=(0.9, 0.99), weight_decay=1e-4, fused=True)
    path, first = run.work_dir / STATE_FILE, 0
    if state := load_state(path):
        vae.load_state_dict(state["vae"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    log, losses, start = Log(run.work_dir / "vae_log.jsonl", first), [], time.perf_counter()

    for step in range(first, run.steps):
        generator = step_generator(run.seed, step)
        x = to_unit(pixels[batch_indices(len(pixels), run.batch_size, step, run.seed)])
        flip = torch.rand(len(x), 1, 1, 1, generator=generator) < 0.5
        x = torch.where(flip, x.flip(-1), x).to(run.device)
        noise = torch.randn(len(x), 4, 16, 16, generator=generator).to(run.device)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(run.learning_rate, step, run.steps, warmup=50)
        loss = reconstruction_loss(vae, x, noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
        if (step + 1) % run.logging_steps == 0 or step + 1 == run.steps:
            record = dict(stage="vae", step=step + 1, loss=torch.stack(losses).mean().item())
            if (step + 1) % (4 * run.logging_steps) == 0 or step + 1 == run.steps:
                record["heldout_psnr"] = psnr(vae, heldout)
            log(**record, steps_per_second=(step + 1 - first) / (time.perf_counter() - start))
            losses = []
        if (step + 1) % run.checkpointing_steps == 0 or step + 1 == run.steps:
            scaling_factor = 1 / encode(vae, pixels).std().item()
            save_state(
                dict(
                    vae=vae.state_dict(),
                    optimizer=optimizer.state_dict(),
                    step=step + 1,
                    scaling_factor=scaling_factor,
                ),
                path,
            )


def trained_vae(work_dir: Path, device: str) -> AutoencoderKL:
    """The VAE as far as it is trained, with its scaling factor in its configuration."""
    vae = miniature_models.build_vae()
    if state := load_state(work_dir / STATE_FILE):
        vae.load_state_dict(state["vae"])
        vae.register_to_config(scaling_factor=round(state["scaling_factor"], 5))
    return AutoencoderKL.to(vae, device).eval()
