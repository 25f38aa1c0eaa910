r"""What noisy latents can give away, in closed form: repeated observations, telling two pictures apart, zCDP. No data.

x_n = α x_0 + σ z as in :mod:`sdxl_ambient.noise`; SNR = α²/σ² = ᾱ/(1 − ᾱ). All in float64.

Sources: Bun and Steinke, "Concentrated Differential Privacy", arXiv 1605.02658: a Gaussian observation is zCDP (Proposition
1.6), zCDP gives (ε, δ) (Proposition 1.3) and adds up over releases (Lemma 1.7).
"""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import torch

from sdxl_ambient.noise import NoiseSchedule


def snr(schedule: NoiseSchedule, t: int) -> float:
    """α²/σ² at level ``t``."""
    return float(schedule.snr(torch.tensor([t])))


def effective_level(schedule: NoiseSchedule, t: int, k: int) -> float | None:
    """The level of one observation that tells as much as ``k`` independent ones at ``t``; None if it is below level 0.

    The mean of k draws is α x_0 + (σ/√k) z, and it is sufficient for x_0: one observation with k times the SNR. Between
    whole levels log SNR is taken as linear.
    """
    table = schedule.snr(torch.arange(schedule.num_timesteps)).numpy()
    known = np.log(table[table > 0])  # decreasing; at zero terminal SNR the last level has no signal
    wanted = math.log(snr(schedule, t)) + math.log(k)
    return None if wanted > known[0] else float(np.interp(-wanted, -known, np.arange(len(known))))


def pair_error(distance, signal_to_noise: float):
    """Error Φ(−α D/(2σ)) of the best test which of two latents at ``distance`` D, equally likely before, x_n was made of.

    ``distance`` is a number or an array of them; the result is of the same kind.
    """
    half = np.asarray(distance, dtype=np.float64) * math.sqrt(signal_to_noise) / 2
    error = torch.special.erfc(torch.from_numpy(np.atleast_1d(half / math.sqrt(2)))).numpy() / 2
    return float(error[0]) if np.ndim(distance) == 0 else error


def distance_for_error(error: float, signal_to_noise: float) -> float:
    """The latent distance at which the best test of two errs that often, 0 < error ≤ ½: −2 (σ/α) Φ⁻¹(error)."""
    return -2 * NormalDist().inv_cdf(error) / math.sqrt(signal_to_noise)


def rho(clip_norm: float, signal_to_noise: float, k: int = 1) -> float:
    """zCDP of ``k`` observations of a latent of norm at most C = ``clip_norm``: k (2αC)²/(2σ²) = 2 k C² SNR.

    Replacing a picture moves α x_0 by at most 2αC, the sensitivity; the noise has standard deviation σ.
    """
    return 2 * k * clip_norm**2 * signal_to_noise


def epsilon(rho: float, delta: float) -> float:
    """ε of (ε, δ)-differential privacy that ρ-zCDP implies: ρ + 2 √(ρ ln(1/δ))."""
    return rho + 2 * math.sqrt(rho * math.log(1 / delta))


def rho_for_epsilon(epsilon: float, delta: float) -> float:
    """The largest ρ whose :func:`epsilon` is at most that: (√(L + ε) − √L)² with L = ln(1/δ)."""
    log = math.log(1 / delta)
    return (epsilon / (math.sqrt(log + epsilon) + math.sqrt(log))) ** 2  # the same without a difference of near numbers


def snr_for_epsilon(epsilon: float, delta: float, clip_norm: float) -> float:
    """The largest SNR at which one observation of a latent of norm at most ``clip_norm`` is (ε, δ)-private by zCDP."""
    return rho_for_epsilon(epsilon, delta) / (2 * clip_norm**2)
