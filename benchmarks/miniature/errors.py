"""Errors of the miniature's x̂_0 by noise level, on pictures that it was taught and on ones that it never saw.

    python -m benchmarks.miniature.errors [--pipeline miniature/pipeline]

Mean square error of x̂_0 in the latent, of the first 192 pictures of a split, with their captions and with none, as JSON.
"""

import argparse
import json
from pathlib import Path

import torch
from diffusers import StableDiffusionXLPipeline

from benchmarks.miniature import data as miniature_data
from benchmarks.miniature.training import denoising_loss
from benchmarks.miniature.vae import encode

LEVELS = (50, 250, 500, 700, 900)
PICTURES = 192


@torch.no_grad()
def errors(pipeline, folder: Path) -> dict:
    """{"caption" or "none": {t: error}} of one split's pictures; the noise of a level is the same for all models."""
    captions, pixels = miniature_data.read_imagefolder(folder)
    captions, pixels = captions[:PICTURES], pixels[:PICTURES]
    latents = encode(pipeline.vae, pixels) * pipeline.vae.config.scaling_factor
    states, _, pooled, _ = pipeline.encode_prompt(captions, do_classifier_free_guidance=False)
    bars, found = pipeline.scheduler.alphas_cumprod, {}
    for name, keep in (("caption", 1), ("none", 0)):
        found[name] = {}
        for t in LEVELS:
            noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(t))
            at = torch.full((len(latents),), t)
            loss = denoising_loss(pipeline.unet, bars, latents, states * keep, pooled * keep, at, noise).mean()
            found[name][t] = round((loss * (1 - bars[t]) / bars[t]).item(), 4)
    return found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", type=Path, default=Path("miniature/pipeline"))
    parser.add_argument("--data", type=Path, default=Path("miniature/data"))
    args = parser.parse_args(argv)
    pipeline = StableDiffusionXLPipeline.from_pretrained(args.pipeline)
    print(json.dumps({split: errors(pipeline, args.data / split) for split in ("pretrain", "heldout")}, indent=2))


if __name__ == "__main__":
    main()
