r"""From which noise level on is an untrusted image as good as a trusted one? Writes that level for each, as its t_n.

    python -m sdxl_ambient.annotate --pretrained_model_name_or_path BASE --trusted_data_dir GOOD --untrusted_data_dir BAD \
        --output_dir OUT

The procedure of "Ambient Diffusion Omni" (arXiv 2506.10038): a small classifier learns to tell noisy latents of the two sets
apart, at every level; where it can't for an image, noise hides what is wrong with it.

    trusted/, untrusted/   links to the images; nothing is copied
    annotations.json       settings, how well the sets are told apart at every level, and every image's probabilities
    metadata.jsonl         file_name, text and t_n of both sets, written last; OUT is a --train_data_dir for --t_n_column t_n

This is about quality. It protects no image: trusted ones are stored clean unless --trusted_t_n is given. Clean latents and
the noise that the classifier sees exist in memory only. docs/ANNOTATING.md says how to read the result.
"""

from __future__ import annotations

import numpy as np

from sdxl_ambient.annotate.options import AnnotateOptions
from sdxl_ambient.annotate.settings import AnnotateSettings
from sdxl_ambient.config import parse_options
from sdxl_ambient.config.settings import settings_of
from sdxl_ambient.errors import run_command


def summary_lines(settings: AnnotateSettings, annotations: dict) -> list[str]:
    """What is printed at the end."""
    from sdxl_ambient.annotate.run import training_command  # here for start-up time

    lines = ["    t  accuracy  interval     mean probability: trusted, untrusted"]
    for t, level in annotations["levels"].items():
        low, high = level["interval"]
        means = level["mean_probability"]
        lines.append(
            f"{t:>5} {level['accuracy']:>8.2f}  {low:.2f} to {high:.2f}  {means['trusted']:>22.2f}, {means['untrusted']:.2f}"
        )
    lines += [f"warning: {warning}" for warning in annotations["warnings"]]
    counts = annotations["counts"]
    used = [i["t_n"] for i in annotations["images"] if i["used"] and i["set"] == "untrusted"]
    spread = ""
    if used:
        low, middle, high = np.quantile(used, (0, 0.5, 1), method="inverted_cdf")
        spread = f" at t_n from {low} to {high}, median {middle}"
    trusted = "clean" if settings.trusted_t_n is None else f"at t_n = {settings.trusted_t_n}"
    lines += [
        f"{counts['trusted']} trusted images, {trusted}",
        f"{counts['untrusted']} untrusted images: {len(used)} usable{spread}; {counts['not_usable']} left out, usable at no "
        f"level up to {min(settings.max_t_n, settings.levels[-1])}",
        f"{counts['skipped']} files skipped",
        f"{settings.output_dir} leads to clean images: treat it like them. To train on it:",
        training_command(settings),
    ]
    return lines


def main(argv: list[str] | None = None) -> int:
    options = parse_options(AnnotateOptions, argv, prog="sdxl_ambient.annotate", description=__doc__)
    return run_command("sdxl_ambient.annotate", lambda: _locked(options))


def _locked(options: AnnotateOptions) -> None:
    from sdxl_ambient.locks import locked

    with locked(options.output_dir):
        _annotate(options)


def _annotate(options: AnnotateOptions) -> None:
    # Here for start-up time: options are parsed before torch and diffusers are imported.
    from sdxl_ambient.annotate.run import annotate

    settings = settings_of(AnnotateSettings, options)
    print(*summary_lines(settings, annotate(settings)), sep="\n")


if __name__ == "__main__":
    raise SystemExit(main())
