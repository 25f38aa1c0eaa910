"""A picture of what the miniature draws, for the documentation."""

from pathlib import Path

import matplotlib
import torch
from diffusers import StableDiffusionXLPipeline

from benchmarks.miniature import data as miniature_data

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

CAPTIONS = {
    "pretrain": (
        "green heart", "blue book", "clock face ten oclock", "woman astronaut", "japan flag", "tiger face",
        "pouting face", "red apple", "sunflower", "hot beverage", "octopus", "rocket", "hamburger", "snail",
    ),
    "finetune": ("penguin", "pineapple", "saxophone", "ambulance", "canada flag", "necktie", "hippopotamus"),
    "heldout": ("strawberry", "butterfly", "chicken", "airplane", "norway flag", "full moon with face", "cupcake"),
}  # fmt: skip
SAMPLES = 4
STEPS = 25
GUIDANCE = 4.0


def draw(pipeline, captions, seed):
    """Pictures (n captions) x SAMPLES, float arrays (64, 64, 3); a picture depends on its own seed only."""
    prompts = [caption for caption in captions for _ in range(SAMPLES)]
    generators = [torch.Generator().manual_seed(seed + i) for i in range(len(prompts))]
    images = pipeline(
        prompts, height=64, width=64, num_inference_steps=STEPS, guidance_scale=GUIDANCE, generator=generators,
        output_type="np",
    ).images  # fmt: skip
    return images.reshape(len(captions), SAMPLES, *images.shape[1:])


def grid(miniature, path, seed=0):
    """Write the grid to `path`: two columns of captions from pre-training, one from each other split."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(Path(miniature, "pipeline"))
    pipeline.set_progress_bar_config(disable=True)
    rows = []  # (split, caption, real picture, samples)
    for split, captions in CAPTIONS.items():
        emoji = {e.text: e for e in miniature_data.read_emoji(Path(miniature, "data", split))}
        samples = draw(pipeline, captions, seed)
        rows += [(split, c, emoji[c].on_white(), drawn) for c, drawn in zip(captions, samples, strict=False)]

    columns, height = 4, -(-len(rows) // 4)
    width = SAMPLES + 1
    figure, axes = plt.subplots(height, columns * (width + 1), figsize=(columns * (width + 1) * 0.72, height * 0.92))
    for axis in axes.flat:
        axis.axis("off")
    for i, (split, caption, real, drawn) in enumerate(rows):
        column, row = divmod(i, height)
        first = column * (width + 1)
        for k, picture in enumerate((real, *drawn)):
            axes[row, first + k].imshow(picture, interpolation="nearest")
        axes[row, first].set_title("real", fontsize=6, pad=2)
        axes[row, first + 1].set_title(caption, fontsize=7, loc="left", pad=2)
        if row == 0:
            heading = {"pretrain": "trained on", "finetune": "never seen (finetune)", "heldout": "never seen (heldout)"}
            axes[row, first].text(0, 1.35, heading[split], transform=axes[row, first].transAxes, fontsize=9,
                                  fontweight="bold", va="bottom")  # fmt: skip
    figure.subplots_adjust(0.01, 0.01, 0.99, 0.92, wspace=0.06, hspace=0.3)
    figure.savefig(path, dpi=90)
    plt.close(figure)
