"""Training of the miniature's VAE, and what is done with it."""

import time

import torch
import torch.nn.functional as F

from benchmarks.miniature import data as miniature_data
from benchmarks.miniature import models as miniature_models
from benchmarks.miniature.training import Log, batch_indices, learning_rate, load_state, save_state, step_generator


def gradient_l1(a, b):
    """L1 distance of the horizontal and vertical differences of two image batches (n, c, h, w): keeps edges sharp."""
    d = a - b
    return d.diff(dim=-1).abs().mean() + d.diff(dim=-2).abs().mean()


def to_unit(pixels):
    """uint8 pixels (n, 3, h, w) => float32 in [-1, 1]."""
    return pixels.float() / 127.5 - 1


@torch.no_grad()
def encode(vae, pixels):
    """uint8 pixels (n, 3, 64, 64) => mean latents (n, 4, 16, 16), not yet scaled."""
    batches = (to_unit(batch.to(vae.device)) for batch in pixels.split(64))
    return torch.cat([vae.encode(batch).latent_dist.mode() for batch in batches])


@torch.no_grad()
def psnr(vae, pixels):
    """Mean peak signal-to-noise ratio, in dB, of the reconstructions of uint8 pixels (n, 3, 64, 64)."""
    restored = torch.cat([vae.decode(z).sample for z in encode(vae, pixels).split(64)]).clamp(-1, 1)
    error = ((restored.cpu() - to_unit(pixels)) / 2).square().mean((1, 2, 3))
    return (-10 * error.log10()).mean().item()


def train_vae(args):
    _, pixels = miniature_data.read_imagefolder(args.output_dir / "data" / "pretrain")
    _, heldout = miniature_data.read_imagefolder(args.output_dir / "data" / "heldout")
    torch.manual_seed(args.seed)
    vae = miniature_models.build_vae().to(args.device)
    optimizer = torch.optim.AdamW(vae.parameters(), betas=(0.9, 0.99), weight_decay=1e-4, fused=True)
    path, first = args.work_dir / "vae.pt", 0
    if state := load_state(path):
        vae.load_state_dict(state["vae"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    log, losses, start = Log(args.work_dir / "vae_log.jsonl", first), [], time.perf_counter()

    for step in range(first, args.vae_steps):
        generator = step_generator(args.seed, step)
        x = to_unit(pixels[batch_indices(len(pixels), args.vae_batch_size, step, args.seed)])
        flip = torch.rand(len(x), 1, 1, 1, generator=generator) < 0.5
        x = torch.where(flip, x.flip(-1), x).to(args.device)
        noise = torch.randn(len(x), 4, 16, 16, generator=generator).to(args.device)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(args.vae_learning_rate, step, args.vae_steps, warmup=50)
        with torch.autocast(args.device, torch.bfloat16):
            posterior = vae.encode(x).latent_dist
            restored = vae.decode(posterior.mean + posterior.std * noise).sample.float()
        loss = F.l1_loss(restored, x) + gradient_l1(restored, x) + 1e-6 * posterior.kl().float().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
        if (step + 1) % args.logging_steps == 0 or step + 1 == args.vae_steps:
            record = dict(stage="vae", step=step + 1, loss=torch.stack(losses).mean().item())
            if (step + 1) % (4 * args.logging_steps) == 0 or step + 1 == args.vae_steps:
                record["heldout_psnr"] = psnr(vae, heldout)
            log(**record, steps_per_second=(step + 1 - first) / (time.perf_counter() - start))
            losses = []
        if (step + 1) % args.checkpointing_steps == 0 or step + 1 == args.vae_steps:
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


def trained_vae(args):
    """The VAE as far as it is trained, with its scaling factor in its configuration."""
    vae = miniature_models.build_vae()
    if state := load_state(args.work_dir / "vae.pt"):
        vae.load_state_dict(state["vae"])
        vae.register_to_config(scaling_factor=round(state["scaling_factor"], 5))
    return vae.to(args.device).eval()
