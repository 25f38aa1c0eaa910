"""A base that really predicts v: the miniature with a LoRA that was trained for it, merged into its weights.

A scheduler's configuration alone makes no such base; its network would be refused, as it should be.
``python -m tests.support.v_base`` trains the LoRA anew, in minutes, after the miniature has changed.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch

from sdxl_ambient.formats.attach import start_from
from sdxl_ambient.formats.peft import save_lora
from sdxl_ambient.images.load import list_images, load_rgb
from sdxl_ambient.models import add_lora, encode_image, encode_prompts, load_encoders, load_schedule, load_unet

ROOT = Path(__file__).resolve().parents[2]
MINIATURE = ROOT / "miniature/pipeline"
LORA = Path(__file__).with_name("v_prediction")
STEPS, BATCH, RANK = 1500, 32, 4


def make_v_base(folder: Path, miniature: Path = MINIATURE, *, zero_snr: bool = False, **scheduler) -> Path:
    """A copy of the miniature in ``folder`` whose UNet predicts v and whose scheduler says so; returns it.

    ``zero_snr``: with the schedule whose last level has no signal. ``scheduler``: more for the scheduler's configuration.
    """
    shutil.copytree(miniature, folder)
    unet = load_unet(miniature)
    start_from(unet, LORA)
    unet.merge_and_unload() if hasattr(unet, "merge_and_unload") else _merge(unet)
    unet.save_pretrained(folder / "unet")
    file = folder / "scheduler/scheduler_config.json"
    config = json.loads(file.read_text()) | {"prediction_type": "v_prediction", "rescale_betas_zero_snr": zero_snr}
    file.write_text(json.dumps(config | scheduler))
    return folder


def _merge(unet) -> None:
    unet.fuse_lora()
    unet.unload_lora()


def main() -> None:
    torch.manual_seed(0)
    encoders, schedule, unet = load_encoders(str(MINIATURE)), load_schedule(MINIATURE), load_unet(MINIATURE)
    listing = list_images(ROOT / "miniature/data/pretrain")
    latents = torch.stack([encode_image(encoders.vae, _pixels(image.path)) for image in listing])
    embeds, pooled = encode_prompts([image.caption or "" for image in listing], encoders.tokenizers, encoders.text_encoders)
    add_lora(unet, rank=RANK, alpha=RANK, targets=["all"])
    weights = [p for p in unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=3e-3, weight_decay=0)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=STEPS, pct_start=0.05)
    mean = 0.0
    for step in range(STEPS):
        rows = torch.randint(len(latents), (BATCH,))
        t, noise = torch.randint(schedule.num_timesteps, (BATCH,)), torch.randn(BATCH, *latents.shape[1:])
        x_0, keep = latents[rows], (torch.rand(BATCH) > 0.15).float()
        alpha, sigma = (schedule.broadcast(c, x_0) for c in (schedule.alpha(t), schedule.sigma(t)))
        conditioning = {
            "text_embeds": pooled[rows] * keep[:, None],
            "time_ids": torch.tensor([[64, 64, 0, 0, 64, 64]] * BATCH).float(),
        }
        v = unet(alpha * x_0 + sigma * noise, t, embeds[rows] * keep[:, None, None], added_cond_kwargs=conditioning).sample
        loss = (v - (alpha * noise - sigma * x_0)).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1)
        optimizer.step(), optimizer.zero_grad(), rate.step()
        mean = 0.98 * mean + 0.02 * float(loss)
        if step % 50 == 49:
            print(step + 1, round(mean / (1 - 0.98 ** (step + 1)), 4), flush=True)
    save_lora(unet.half(), LORA, {})


def _pixels(path: Path) -> torch.Tensor:
    image = load_rgb(path)
    image = image[0] if isinstance(image, tuple) else image
    pixels = torch.frombuffer(bytearray(image.resize((64, 64)).tobytes()), dtype=torch.uint8)
    return pixels.reshape(64, 64, 3).permute(2, 0, 1) / 127.5 - 1


if __name__ == "__main__":
    main()
