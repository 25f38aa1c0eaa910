"""Assesses what noise levels protect: closed forms, accounting, and attacks on pictures of the set."""

from __future__ import annotations

import math

from sdxl_ambient.errors import ModelError
from sdxl_ambient.models.load import load_schedule
from sdxl_ambient.noise import NoiseSchedule
from sdxl_ambient.privacy import accounting
from sdxl_ambient.privacy.attacks import coefficients, measure
from sdxl_ambient.privacy.options import PrivacyOptions
from sdxl_ambient.provenance import versions

OBSERVATIONS = (1, 2, 4, 10, 100)  # numbers of draws that figures are given for
TARGET_EPSILON = 8.0  # about the largest that is used where differential privacy is claimed
NOTE = (
    "No differential privacy is claimed: training clips no latent, and at these levels epsilon would mean nothing if it "
    "did. A clip norm taken from private data is itself not private."
)


def closed_forms(options: PrivacyOptions, schedule: NoiseSchedule, t: int, norms: dict[str, float]) -> dict:
    """What needs no picture at a level; ``norms`` are the clip norms to account for, by where they come from."""
    signal, (alpha, sigma) = accounting.snr(schedule, t), coefficients(schedule, t)
    return {
        "alpha": alpha,
        "sigma": sigma,
        "snr": signal,
        "observations": {str(k): accounting.effective_level(schedule, t, k) for k in OBSERVATIONS},
        "distance_for_5_percent_error": accounting.distance_for_error(0.05, signal),
        "zcdp": {name: zcdp(norm, signal, options.delta) for name, norm in norms.items()},
    }


def zcdp(clip_norm: float, signal: float, delta: float) -> dict:
    """ρ and ε of one observation and of several, at a clip norm C and an SNR."""
    found = {str(k): accounting.rho(clip_norm, signal, k) for k in OBSERVATIONS}
    return {
        "clip_norm": clip_norm,
        "rho": found,
        "epsilon": {k: accounting.epsilon(rho, delta) for k, rho in found.items()},
    }


def accounted(options: PrivacyOptions, schedule: NoiseSchedule, norms: dict[str, float]) -> dict:
    """What a whole schedule can give: the SNR that a meaningful ε needs, and that of the last level that has a signal."""
    known = [t for t in range(schedule.num_timesteps) if accounting.snr(schedule, t) > 0]
    last = accounting.snr(schedule, known[-1])
    return {
        "delta": options.delta,
        "target_epsilon": TARGET_EPSILON,
        "last_level": known[-1],
        "last_snr": last,
        "clip_norms": {
            name: {
                "clip_norm": norm,
                "snr_needed": accounting.snr_for_epsilon(TARGET_EPSILON, options.delta, norm),
                "last_epsilon": accounting.epsilon(accounting.rho(norm, last), options.delta),
            }
            for name, norm in norms.items()
        },
    }


def assess(options: PrivacyOptions, log=print) -> dict:
    """All figures, as ``--output_file`` holds them.

    Raises:
        ImagesMissing, ImageError, ModelError, PreviewError, PrivacyError: with one line that says what is wrong.
    """
    schedule = load_schedule(options.pretrained_model_name_or_path, options.revision)
    if max(options.t_n) >= schedule.num_timesteps:
        raise ModelError(f"--t_n: {max(options.t_n)} is beyond this model's last level, {schedule.num_timesteps - 1}")
    if coefficients(schedule, min(options.t_n))[1] == 0:
        raise ModelError(f"--t_n: {min(options.t_n)} has no noise in this model's schedule; allowed is a level that has")
    norms = {"unit_variance": math.sqrt(options.dimension)}
    if options.clip_norm is not None:
        norms["clip_norm"] = options.clip_norm
    data, by_level = None, {}
    if options.train_data_dir is not None:
        data, by_level, found = measure(options, schedule, log)
        norms.update(found)
    return {
        "note": NOTE,
        "settings": settings(options),
        "data": data,
        "levels": {str(t): {**closed_forms(options, schedule, t, norms), **by_level.get(t, {})} for t in options.t_n},
        "zcdp": accounted(options, schedule, norms),
        "versions": versions(),
    }


def settings(options: PrivacyOptions) -> dict:
    """The options that shape the figures. No folder: their names may say what is in them."""
    names = ("resolution", "center_crop", "caption", "num_images", "num_candidates", "num_references", "draws", "use_unet")
    more = ("posterior_samples", "steps", "dimension", "clip_norm", "delta", "seed", "dtype")
    return {name: getattr(options, name) for name in (*names, *more)}
