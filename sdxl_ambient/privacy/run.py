"""Assesses what noise levels protect: closed forms, accounting, and attacks on pictures of the set."""

from __future__ import annotations

import math
from typing import Any

from sdxl_ambient.errors import ModelError
from sdxl_ambient.images.sources import Log
from sdxl_ambient.models.base import check_sdxl, load_schedule
from sdxl_ambient.noise import NoiseSchedule
from sdxl_ambient.privacy import accounting
from sdxl_ambient.privacy.attacks import coefficients, measure
from sdxl_ambient.privacy.settings import PrivacySettings
from sdxl_ambient.provenance import versions

OBSERVATIONS = (1, 2, 4, 10, 100)  # numbers of draws that figures are given for
TARGET_EPSILON = 8.0  # about the largest that is used where differential privacy is claimed
NOTE = (
    "No differential privacy is claimed: training clips no latent, and at these levels epsilon would mean nothing if it "
    "did. A clip norm taken from private data is itself not private."
)


def closed_forms(schedule: NoiseSchedule, t: int, norms: dict[str, float], delta: float) -> dict[str, Any]:
    """What needs no picture at a level; ``norms`` are the clip norms to account for, by where they come from."""
    signal, (alpha, sigma) = accounting.snr(schedule, t), coefficients(schedule, t)
    return {
        "alpha": alpha,
        "sigma": sigma,
        "snr": signal,
        "observations": {str(k): accounting.effective_level(schedule, t, k) for k in OBSERVATIONS},
        "distance_for_5_percent_error": accounting.distance_for_error(0.05, signal),
        "zcdp": {name: zcdp(norm, signal, delta) for name, norm in norms.items()},
    }


def zcdp(clip_norm: float, signal: float, delta: float) -> dict[str, Any]:
    """ρ and ε of one observation and of several, at a clip norm C and an SNR: ε exactly, and the bound that ρ implies."""
    rhos = {str(k): accounting.rho(clip_norm, signal, k) for k in OBSERVATIONS}
    return {
        "clip_norm": clip_norm,
        "rho": rhos,
        "epsilon": {k: accounting.zcdp_epsilon(rho, delta) for k, rho in rhos.items()},
        "epsilon_exact": {k: accounting.gaussian_epsilon(rho, delta) for k, rho in rhos.items()},
    }


def accounted(schedule: NoiseSchedule, norms: dict[str, float], delta: float) -> dict[str, Any]:
    """What a whole schedule can give: the SNR that a meaningful ε needs, and that of the last level that has a signal."""
    known = [t for t in range(schedule.num_timesteps) if accounting.snr(schedule, t) > 0]
    last = accounting.snr(schedule, known[-1])
    return {
        "delta": delta,
        "target_epsilon": TARGET_EPSILON,
        "last_level": known[-1],
        "last_snr": last,
        "clip_norms": {name: _last_level(norm, last, delta) for name, norm in norms.items()},
    }


def _last_level(clip_norm: float, signal: float, delta: float) -> dict[str, float]:
    """The SNR that the target ε needs, and the ε of the last level, each exactly and by zCDP's bound."""
    rho = accounting.rho(clip_norm, signal)
    return {
        "clip_norm": clip_norm,
        "snr_needed": accounting.zcdp_snr(TARGET_EPSILON, delta, clip_norm),
        "snr_needed_exact": accounting.gaussian_snr(TARGET_EPSILON, delta, clip_norm),
        "last_epsilon": accounting.zcdp_epsilon(rho, delta),
        "last_epsilon_exact": accounting.gaussian_epsilon(rho, delta),
    }


def assess(settings: PrivacySettings, log: Log = print) -> dict[str, Any]:
    """All figures, as ``--output_file`` holds them.

    Raises:
        ImagesMissing, ImageError, ModelError, ProbeError, PrivacyError: with one line that says what is wrong.
    """
    base, predicts = settings.pretrained_model_name_or_path, settings.prediction_type
    check_sdxl(base, settings.revision, log, predicts)
    schedule = load_schedule(base, settings.revision, predicts)
    if max(settings.t_n) >= schedule.num_timesteps:
        raise ModelError(f"--t_n: {max(settings.t_n)} is beyond this model's last level, {schedule.num_timesteps - 1}")
    if coefficients(schedule, min(settings.t_n))[1] == 0:
        raise ModelError(f"--t_n: {min(settings.t_n)} has no noise in this model's schedule; allowed is a level that has")
    norms = {"unit_variance": math.sqrt(settings.dimension)}
    if settings.clip_norm is not None:
        norms["clip_norm"] = settings.clip_norm
    data, by_level = None, {}
    if settings.train_data_dir is not None:
        data, by_level, latent_norms = measure(settings, schedule, log)
        norms.update(latent_norms)
    return {
        "note": NOTE,
        "settings": recorded(settings),
        "data": data,
        "levels": {
            str(t): {**closed_forms(schedule, t, norms, settings.delta), **by_level.get(t, {})} for t in settings.t_n
        },
        "zcdp": accounted(schedule, norms, settings.delta),
        "versions": versions(),
    }


def recorded(settings: PrivacySettings) -> dict[str, Any]:
    """The settings that shape the figures. No folder: their names may say what is in them."""
    names = ("resolution", "center_crop", "caption", "num_images", "num_candidates", "num_references", "draws", "use_unet")
    more = ("posterior_samples", "steps", "dimension", "clip_norm", "delta", "seed", "dtype")
    return {name: getattr(settings, name) for name in (*names, *more)}
