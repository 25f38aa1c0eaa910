r"""What whoever takes a store of noisy latents can do with it, measured and in closed form.

    python -m sdxl_ambient.privacy --pretrained_model_name_or_path BASE --train_data_dir DIR --reference_data_dir OTHER \
        --t_n 100 300 500 800 --output_file privacy.json

    reconstruction    pictures from x_n: by the best linear filter, its covariance from OTHER images, and by the base model
    identification    which of N known pictures x_n was made of
    observations      what several independent draws of a picture amount to
    zcdp              the differential privacy of one draw, if latents were clipped (which training doesn't do)

Without ``--train_data_dir``, the last two alone. Figures only are written, no picture and no latent. The noise is its own,
made from ``--seed``; no noise key is read. docs/PRIVACY.md says how to read the figures.
"""

from __future__ import annotations

import json
import sys

from sdxl_ambient.config import parse_options
from sdxl_ambient.config.settings import settings_of
from sdxl_ambient.errors import run_command
from sdxl_ambient.privacy.options import PrivacyOptions
from sdxl_ambient.provenance import write_json


def summary_lines(assessment: dict) -> list[str]:
    """A short table, a line each."""
    from sdxl_ambient.privacy.run import OBSERVATIONS  # here for start-up time

    lines = [] if assessment["data"] is None else [*_attacks(assessment), ""]
    lines.append("k independent draws of one picture at t_n tell as much as one draw at level")
    lines.append("  t_n" + "".join(f"{'k = ' + str(k):>9}" for k in OBSERVATIONS))
    for t, level in assessment["levels"].items():
        shown = (level["observations"][str(k)] for k in OBSERVATIONS)
        lines.append(f"{t:>5}" + "".join(f"{'below 0' if s is None else format(s, '.0f'):>9}" for s in shown))
    return [*lines, "", *_accounting(assessment)]


def _attacks(assessment: dict) -> list[str]:
    data = assessment["data"]
    ways = list(next(iter(assessment["levels"].values()))["reconstruction"])
    fixed = {name: means["psnr_db"] for name, means in data["reconstruction"].items()}
    lines = [
        f"PSNR to the clean picture in dB, mean of {data['reconstructed']}; through the VAE {fixed['vae_round_trip']:.1f}, "
        f"mean of the references {fixed['reference_mean']:.1f}; and found among {data['candidates']} candidates",
        "  t_n" + "".join(f"{way:>10}" for way in ways) + "     found  (by chance)  error of two, expected",
    ]
    for t, level in assessment["levels"].items():
        rates = level["identification"]
        lines.append(
            f"{t:>5}"
            + "".join(f"{level['reconstruction'][way]['psnr_db']:>10.1f}" for way in ways)
            + f"{rates['rate']:>10.1%}  {'(' + format(rates['chance'], '.1%') + ')':>11}"
            + f"  {rates['pair_error']:>12.2e}, {rates['pair_error_expected']:.2e}"
        )
    return lines


def _accounting(assessment: dict) -> list[str]:
    whole, levels_of = assessment["zcdp"], assessment["levels"]
    lines = [
        f"epsilon of one draw at delta = {whole['delta']:g}, if latents were clipped to norm C (training doesn't)",
        "".join(["C".rjust(24), *(f"t_n = {t}".rjust(12) for t in levels_of), f"last = {whole['last_level']}".rjust(14)]),
    ]
    for name, at in whole["clip_norms"].items():
        for key, label in (("epsilon_exact", f"{name:>14} {at['clip_norm']:>9.1f}"), ("epsilon", "bound by zCDP".rjust(24))):
            each = "".join(f"{level['zcdp'][name][key]['1']:>12.3g}" for level in levels_of.values())
            lines.append(f"{label}{each}{at['last_' + key]:>14.3g}")
    unit = whole["clip_norms"]["unit_variance"]
    lines.append(
        f"unit_variance: a latent of {assessment['settings']['dimension']} numbers of variance 1. There epsilon = "
        f"{whole['target_epsilon']:g} needs SNR {unit['snr_needed_exact']:.1e}; the last level has {whole['last_snr']:.1e}"
    )
    return [*lines, assessment["note"]]


def main(argv: list[str] | None = None) -> int:
    options = parse_options(PrivacyOptions, argv, prog="sdxl_ambient.privacy", description=__doc__)
    return run_command("sdxl_ambient.privacy", lambda: _assess(options))


def _assess(options: PrivacyOptions) -> None:
    # Here for start-up time: options are parsed before torch and diffusers are imported.
    from sdxl_ambient.privacy.run import assess
    from sdxl_ambient.privacy.settings import PrivacySettings

    assessment = assess(settings_of(PrivacySettings, options), log=lambda message: print(message, file=sys.stderr))
    if options.output_file:
        write_json(options.output_file, assessment)
    else:
        print(json.dumps(assessment, indent=2, ensure_ascii=False, allow_nan=False))
    # What is printed on stdout stays JSON.
    print("\n".join(summary_lines(assessment)), file=sys.stdout if options.output_file else sys.stderr)


if __name__ == "__main__":
    raise SystemExit(main())
