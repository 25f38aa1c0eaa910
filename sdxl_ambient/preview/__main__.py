r"""What noisy latents show, level by level: an aid to choosing t_n before a store is drawn.

    python -m sdxl_ambient.preview --pretrained_model_name_or_path BASE --train_data_dir DIR --t_n 100 300 500 800 \
        --output_dir OUT

For a few images of a set and every level: the noisy latent as the VAE decodes it, the base model's x̂_0 = E[x_0|x_n] in one
step, and samples of p(x_0|x_n) by its reverse chain, each with its similarity to the original; and whether the latent can
still be told from the others of the set.

    preview.json     every number; written anew after each step, so that an interrupted run goes on where it stopped
    tiles/           the pictures, 8-bit PNG, in a folder per image
    preview.png      made from those two alone (``--redraw`` makes it again)

**It holds clean images**: treat OUT like the originals. Its noise is its own, made from ``--seed``; no noise key is read.
"""

from __future__ import annotations

from pathlib import Path

from sdxl_ambient.config import parse_options
from sdxl_ambient.config.settings import settings_of
from sdxl_ambient.errors import run_command
from sdxl_ambient.preview.options import PreviewOptions


def main(argv: list[str] | None = None) -> int:
    options = parse_options(PreviewOptions, argv, prog="sdxl_ambient.preview", description=__doc__)
    return run_command("sdxl_ambient.preview", lambda: _locked(options))


def _locked(options: PreviewOptions) -> None:
    from sdxl_ambient.locks import locked

    with locked(options.output_dir):
        _preview(options)


def _preview(options: PreviewOptions) -> None:
    # Here for start-up time: options are parsed before torch and diffusers are imported.
    from sdxl_ambient.preview.files import draw_picture
    from sdxl_ambient.preview.picture import WARNING
    from sdxl_ambient.preview.run import make_preview
    from sdxl_ambient.preview.settings import PreviewSettings

    output = Path(options.output_dir)
    print(f"{output}: {WARNING[0].lower()}{WARNING[1:]}", flush=True)
    if not options.redraw:
        print_levels(make_preview(settings_of(PreviewSettings, options)))
    draw_picture(output)
    print(f"{output / 'preview.png'}, figures in {output / 'preview.json'}")


def print_levels(preview: dict) -> None:
    """A line per level."""
    print("  t_n  best linear   denoised  r noisy  r denoised  r samples  found by denoised, noisy")
    for t, level in preview["levels"].items():
        rates, samples = level["identification_rate"], level["samples"].get("correlation")
        print(
            f"{t:>5} {level['linear_expected']['latent_psnr_db']:>9.1f} dB {level['denoised']['latent_psnr_db']:>7.1f} dB "
            f"{level['noisy']['correlation']:>8.2f} {level['denoised']['correlation']:>11.2f} "
            f"{'-' if samples is None else format(samples, '.2f'):>10}  "
            f"{rates['denoised']['candidates']:.0%}, {rates['noisy']['candidates']:.0%} of {len(preview['images'])} "
            f"among {preview['candidates']}"
        )


if __name__ == "__main__":
    raise SystemExit(main())
